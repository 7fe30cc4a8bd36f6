"""Results of the study with the model's current decoder, for the first block of captions.

    python -m studies.guidance.decoders            # draw what is missing
    python -m studies.guidance --page-only         # write it into the page

The study was drawn with the previous decoder. The latents of both decoders are the same, so the
settings that docs/choosing.md recommends are drawn again for the first block of captions only, and
compared picture by picture. Results are lines of ``docs/data/guidance_decoder.jsonl``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from embedded import MODEL_FOLDER
from server.fitting.samples import prompts_for
from server.models.loading import load_model
from studies.common.page import table
from studies.common.records import Records
from studies.guidance import cells
from studies.guidance.cells import Cell
from studies.guidance.drawing import Drawing
from studies.guidance.measuring import summary
from studies.guidance.results import Results
from studies.guidance.sitters import Sitters
from studies.guidance.study import Sizes, Study

if TYPE_CHECKING:
    from collections.abc import Mapping

DATA: Final = Path("docs/data/guidance_decoder.jsonl")

AGAIN: Final[Mapping[str, Mapping[str, Any]]] = {
    "none": cells.UNGUIDED,
    "cfg 2": cells.cfg(2.0),
    "cfg 4": cells.BASE,
    "cfg 7.5": cells.cfg(7.5),
    "apg 4": cells.apg(4.0),
    "apg 7.5": cells.apg(7.5),
    "magnitude_aware 7.5": cells.magnitude_aware(7.5),
    "apg 4, reuse 2": cells.COMBINED["apg 4, reuse 2"],
    "magnitude_aware 7.5, reuse 2": cells.COMBINED["magnitude_aware 7.5, reuse 2"],
    "cfg 4, autoguidance, adaptive": cells.COMBINED["cfg 4, autoguidance, adaptive"],
}


def decoders(before: Records, after: Records) -> str:
    """The table of captions drawn right and values clipped, with the previous and current decoder.

    Args:
        before: results of the study.
        after: results of this module.
    """
    former, present = Results(before), Results(after)
    lines: list[list[str]] = []
    for name, guidance in AGAIN.items():
        old, new = former.found(guidance), present.found(guidance)
        if old is None or new is None:
            continue
        # The study has more blocks of captions than the one drawn again.
        right, of = new.right
        gained, lost, _ = new.changed(old)
        clipped = old.values("clipped")[:of]
        lines.append(
            [
                name,
                f"{right - gained + lost} of {of}",
                f"{right} of {of}",
                f"+{gained} −{lost}",
                f"{100 * sum(clipped) / of:.1f}",
                f"{100 * new.mean('clipped'):.1f}",
            ]
        )
    head = ["guidance", "right, former", "right, present", "changed"]
    return table([*head, "clipped, former, %", "clipped, present, %"], lines)


def main() -> None:
    """Draw the cells that are missing."""
    parser = argparse.ArgumentParser(prog="python -m studies.guidance.decoders")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--kept", type=Path, default=Path("out/guidance_study"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes, records = Sizes(), Records(options.data)
    model = load_model(MODEL_FOLDER, name="embedded", device="cpu", dtype="float32")
    prompts = prompts_for(MODEL_FOLDER, None)
    drawing = Drawing(model, 32, sizes.fitted_runs, prompts, options.kept)
    sitters = Sitters(sizes.captions, sizes.again, sizes.known_pictures)
    try:
        study = Study(model, model.facts.revision, drawing, sitters, sizes, options.kept)
        for guidance in AGAIN.values():
            of = study.of(Cell(guidance))
            if of not in records:
                result = study.run(Cell(guidance))
                records.add(of, result)
                print(summary(of, result), flush=True)
    finally:
        drawing.stop()


if __name__ == "__main__":
    main()
