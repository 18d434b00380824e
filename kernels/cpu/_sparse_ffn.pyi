"""The compiled module of csrc/module.cpp. Tensors are addresses; 0 stands for none.

Arguments are found fastest in this order.
"""

Handle = object

def prepare(
    *,
    rows_FPB: int,
    biases_FP: int,
    off_F: int,
    down_D: int,
    neurons: int,
    width: int,
    lines: int,
    gated: bool,
    dtype: int,
    act: int,
    threshold: float,
    up_act: int,
    up_threshold: float,
    screen_FB: int,
    screen_scale_F: int,
    screen_error_F: int,
    screen_reach: float,
    isa: int,
) -> Handle: ...
def run(
    ffn: Handle,
    /,
    *,
    threads: int,
    x_TD: int,
    dtype: int,
    tokens: int,
    mask_TE: int,
    experts: int,
    y_TD: int,
    few: int,
    most_few: float,
    most_many: float,
) -> int: ...
def prepare_linear(
    *,
    rows_NB: int,
    bias_N: int,
    rows: int,
    width: int,
    lines: int,
    dtype: int,
    zero: float,
    isa: int,
) -> Handle: ...
def multiply(
    linear: Handle, /, *, threads: int, x_TD: int, dtype: int, tokens: int, y_TN: int
) -> None: ...
def isas() -> list[str]: ...
def advise_huge_pages(start: int, size: int, /) -> None: ...
