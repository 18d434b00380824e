"""Writes a page that shows an inspection and needs no network, no other file and no server.

Letters: T tokens, L FFNs, E experts, K tokens kept an expert, C tokens of context.
"""

from __future__ import annotations

import base64
import json
import math
import re
import secrets
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_tools.atomic import new_file
from moe_tools.experts.selectors import Threshold
from moe_tools.extras import needed
from moe_tools.inspection.inspection import Inspection
from moe_tools.inspection.kept import Decisions
from moe_tools.inspection.tally import Tally
from moe_tools.inspection.watch import AFTER, BEFORE
from moe_tools.report.report import Row

LONGEST = 128
"""Tokens that are shown one by one."""
CELLS = 1_000_000
"""Decisions that are shown one by one, a byte each: a page stays below 5 MB."""
RANKS = 1024
"""Experts of an FFN that the load map draws; of more, evenly spaced ranks."""
EXAMPLES = 40_000
"""Examples of what experts respond to: `SHOWN` an expert, fewer or none where that is more."""
SHOWN = 3
UNSEEN, STEPS = 0, 126
"""A byte a decision: 0 unseen, 1 to 127 off, 128 to 254 on; the distance to the threshold inside.
"""


def write_page(
    inspection: Inspection, file: str | Path, *, title: str, sweep: Sequence[Row] = ()
) -> Path:
    """Writes the page: complete or not at all.

    Args:
        inspection: of at least one token.
        file: a new file.
        title: what was inspected, and on what.
        sweep: rows of `evaluate --sweep`, for the Pareto curve.

    Raises:
        ValueError: the file exists, or no token was inspected.
    """
    if Path(file).exists():
        raise ValueError(f"{file} exists: choose another name, or remove it")
    if not inspection.tokens:
        raise ValueError("no token was inspected: run the model under `inspecting` first")
    with new_file(file) as partial:
        text = render(inspection, title=title, sweep=sweep)
        partial.write_text(text, encoding="utf-8", errors="replace")  # half a letter is none
    return Path(file)


def render(inspection: Inspection, *, title: str, sweep: Sequence[Row] = ()) -> str:
    """The page's HTML. Text of the model and the prompt enters it escaped, and as data only.

    Raises:
        ValueError: Bokeh or Jinja is not installed.
    """
    bokeh, jinja2 = (needed(name, "inspect", "the page") for name in ("bokeh.embed", "jinja2"))
    resources = needed("bokeh.resources", "inspect", "the page")
    plots, data = _plots(inspection, sweep), _data(inspection)
    script, places = bokeh.components(plots, wrap_script=False)
    environment = jinja2.Environment(autoescape=True)
    return environment.from_string(_asset("page.html")).render(
        title=title,
        nonce=secrets.token_urlsafe(16),
        style=_asset("page.css"),
        bokeh="\n".join(resources.Resources(mode="inline", components=["bokeh"]).js_raw),
        figures=_inert(script),
        script=_asset("page.js"),
        data=_json(data),
        places=places,
        facts=_facts(inspection),
        shown=len(data["tokens"]),
        tokens=inspection.tokens,
        names=list(inspection.ffns),
    )


def _plots(inspection: Inspection, sweep: Sequence[Row]) -> dict[str, Any]:
    from moe_tools.inspection import figures  # needs Bokeh

    summaries = inspection.summaries
    names = list(inspection.ffns)
    shown, most = _shown(inspection), int(summaries.column("num_experts").max())
    made = {
        "tokens": figures.token_map(*_by_token(inspection, shown)),
        "experts": figures.expert_map(shown, most),
        "loads": figures.load_map(*_loads(inspection)),
        "margins": figures.margin_bars(_tau(inspection, names[0])),
        "sparsity": figures.sparsity_bars(
            summaries.column("sparsity"), summaries.column("captured"), names
        ),
        "similarity": figures.similarity_map(_similarity(inspection)),
    }
    return made | ({"pareto": figures.pareto(sweep)} if sweep else {})


def _data(inspection: Inspection) -> dict[str, Any]:
    """The data that the script shows, in the order of the FFNs."""
    names, shown = list(inspection.ffns), _shown(inspection)
    tallies = list(inspection.tallies.values())
    kept = [_first(inspection, name, shown) for name in names]
    scales = [_scale(inspection, name) for name in names]
    ids = inspection.kept.ids_T[:shown].tolist()
    return {
        "names": names,
        "tokens": [inspection.text([token]) for token in ids],
        "experts": [tally.division.num_experts for tally in tallies],
        "tau": [_tau(inspection, name) for name in names],
        "scales": scales,
        "decisions": _base64(
            np.concatenate(
                [
                    _bytes(found, tally.division.num_experts, shown, scale)
                    for found, tally, scale in zip(kept, tallies, scales, strict=True)
                ]
            )
        ),
        "loads": _base64(np.concatenate([_load_bytes(tally) for tally in tallies])),
        "margins": [
            {
                "width": t.margins.width,
                "first": t.margins.first,
                "counts": t.margins.counts.tolist(),
            }
            for t in tallies
        ],
        "responses": _responses(inspection),
    }


def _shown(inspection: Inspection) -> int:
    """Tokens that the page shows one by one."""
    cells = sum(tally.division.num_experts for tally in inspection.tallies.values())
    return max(1, min(LONGEST, CELLS // cells, len(inspection.kept.ids_T)))


def _first(inspection: Inspection, name: str, shown: int) -> Decisions | None:
    found = inspection.kept.of(name)
    return None if found is None else Decisions(*(value[found.number_T < shown] for value in found))


def _by_token(inspection: Inspection, shown: int) -> list[np.ndarray]:
    """on_LT, margin_LT, captured_LT; NaN where an MoE host gave the token elsewhere."""
    names = list(inspection.ffns)
    made = [np.full((len(names), shown), np.nan, dtype=np.float32) for _ in range(3)]
    for layer, name in enumerate(names):
        found = _first(inspection, name, shown)
        if found is not None:
            on, margin, captured = made
            at_T = found.number_T.numpy()  # a tensor of one number would be read as that number
            on[layer, at_T] = found.mask_TE.float().mean(1)
            margin[layer, at_T] = found.margin_TE.abs().amin(1)
            captured[layer, at_T] = found.captured_T
    return made


def _bytes(found: Decisions | None, experts: int, shown: int, scale: float) -> np.ndarray:
    """Expert by expert, a byte a token: on or off is exact, the distance has 127 steps."""
    made = np.full((experts, shown), UNSEEN, dtype=np.uint8)
    if found is not None:
        steps_TE = (found.margin_TE.abs() / scale * STEPS).round().clamp(0, STEPS)
        bytes_TE = torch.where(found.mask_TE, 128 + steps_TE, 127 - steps_TE)
        made[:, found.number_T.numpy()] = bytes_TE.T.to(torch.uint8).numpy()
    return made.ravel()


def _load_bytes(tally: Tally) -> np.ndarray:
    """Loads as numbers from 0, which is dead, to 65,535, which is always on; both are exact."""
    load_E = tally.load_E.numpy()
    steps_E = (load_E / max(1, tally.tokens) * 65535).round().clip(1, 65534)
    return np.where(load_E == 0, 0, np.where(load_E == tally.tokens, 65535, steps_E)).astype("<u2")


def _scale(inspection: Inspection, name: str) -> float:
    """The largest distance to the threshold that is told apart."""
    edges = inspection.tallies[name].margins.edges
    return max(abs(edges[0]), abs(edges[-1]), 1e-6)


def _loads(inspection: Inspection) -> tuple[np.ndarray, np.ndarray]:
    """load_LR and expert_LR, the busiest first; NaN right of an FFN with fewer experts."""
    tallies = list(inspection.tallies.values())
    most = min(RANKS, max(tally.division.num_experts for tally in tallies))
    load_LR = np.full((len(tallies), most), np.nan, dtype=np.float32)
    expert_LR = load_LR.copy()
    for layer, tally in enumerate(tallies):
        order = np.argsort(-tally.load_E.numpy(), kind="stable")
        ranks = np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)
        load_LR[layer, : len(ranks)] = tally.load_E.numpy()[order[ranks]] / max(1, tally.tokens)
        expert_LR[layer, : len(ranks)] = order[ranks]
    return load_LR, expert_LR


def _similarity(inspection: Inspection) -> np.ndarray:
    """cka_LL; NaN between the stacks of an encoder-decoder."""
    place = {name: index for index, name in enumerate(inspection.ffns)}
    made = np.full((len(place), len(place)), np.nan, dtype=np.float32)
    for row in inspection.similarity:
        made[place[row.ffn], place[row.other]] = row.cka
    return made


def _responses(inspection: Inspection) -> dict[str, Any]:
    """Windows as indices into a list of the words that they need; 0 is no word."""
    tallies = list(inspection.tallies.values())
    experts = sum(tally.division.num_experts for tally in tallies)
    count = min(SHOWN, tallies[0].responses.top, EXAMPLES // experts)
    start, stop = BEFORE - 8, BEFORE + 1 + min(AFTER, 3)
    found = [tally.responses for tally in tallies]
    windows_XC = torch.cat([r.window_EKC[:, :count, start:stop].flatten() for r in found]).numpy()
    scores = torch.cat([r.score_EK[:, :count].flatten() for r in found])
    words, index = np.unique(windows_XC, return_inverse=True)
    shift = 0 if len(words) and words[0] < 0 else 1
    return {
        "count": count,
        "context": stop - start,
        "at": BEFORE - start,
        "words": [""] + [inspection.text([int(word)]) for word in words if word >= 0],
        "windows": _base64((index + shift).astype(np.uint32 if len(words) > 65000 else np.uint16)),
        "wide": len(words) > 65000,
        "scores": [None if math.isinf(s) else s for s in _rounded(scores)],
    }


def _facts(inspection: Inspection) -> list[tuple[str, str, str]]:
    """The figures at the top: value, what it is, and a remark."""
    rows = inspection.summaries
    experts = int(rows.column("num_experts").sum())
    dead, always = int(rows.column("dead").sum()), int(rows.column("always_on").sum())
    captured, on = rows.column("captured"), rows.column("experts_on")
    made = [
        (f"{inspection.sparsity:.1%}", "of the FFN neurons off", "mean over tokens and layers"),
        (
            f"{np.nanmean(on):.0f}",
            f"of {experts / len(rows):.0f} experts on",
            "a token and layer, mean",
        ),
        (f"{dead:,}", "dead experts", f"of {experts:,}: no token selects them"),
        (f"{always:,}", "always-on experts", "every token selects them"),
    ]
    if not np.isnan(captured).all():
        made.append(
            (
                f"{np.nanmean(captured):.1%}",
                "of the output mass captured",
                "by the experts that run",
            )
        )
    return made


def _tau(inspection: Inspection, name: str) -> float | None:
    """The threshold, where it is the same for every token."""
    selector = inspection.ffns[name].selector
    return selector.tau if isinstance(selector, Threshold) else None


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _inert(script: str) -> str:
    """A script whose strings cannot end its element, nor begin a comment or an element in it."""
    return re.sub(r"<(?=[/!]|script)", r"<\\", script, flags=re.IGNORECASE)


def _json(data: Any) -> str:
    """JSON for a script element: no `<` can end it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
