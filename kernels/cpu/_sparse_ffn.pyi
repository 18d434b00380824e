"""The compiled module of csrc/module.cpp. Tensors are addresses; 0 stands for none."""

Handle = object

def prepare(
    rows_FPD: int,
    scales_FP: int,
    biases_FP: int,
    off_F: int,
    down_D: int,
    neurons: int,
    width: int,
    lines: int,
    inputs: int,
    dtype: int,
    act: int,
    theta: float,
    up_act: int,
    up_theta: float,
    screen_FD: int,
    screen_scales_F: int,
    screen_errors_F: int,
    reach: float,
    /,
) -> Handle: ...
def run(
    weights: Handle,
    isa: int,
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
    /,
) -> int: ...
def isas() -> list[str]: ...
def advise_huge_pages(start: int, size: int, /) -> None: ...
