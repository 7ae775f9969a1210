"""Do parents show what their children show? PSNR of every parent against the area average of its children, per slide.

    python benchmarks/alignment.py SLIDE... [--tile-px 224]

Under `pyramid: scanner` the parent is the scanner's own level, shrunk by the scanner's filter and compressed once more; under
`area` it is made here from level 0 and differs by rounding alone. The last column is the same parent against children shifted
by one parent pixel: a misplaced grid would show.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from mad.config.model import TileConfig, TissueConfig
from mad.slides.tissue import tissue_mask
from mad.tiles.aligned import AlignedSlide, Footprint, open_aligned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", nargs="+", type=Path)
    parser.add_argument("--tile-px", type=int, default=224)
    args = parser.parse_args()
    print(
        f"{'slide':34} {'pyramid':8} {'pair':10} {'parents':>7} {'median':>7} {'least':>7} {'shifted':>8}  (PSNR, dB)"
    )
    for path in args.slides:
        for pyramid in ("scanner", "area"):
            with open_aligned(path, TileConfig(tile_px=args.tile_px, pyramid=pyramid)) as slide:
                for level in range(len(slide.grid.ladder) - 1):
                    if not slide.plan.levels[level + 1].available:
                        continue
                    found = np.array(list(ratios(slide, level)))
                    row = f"{path.stem[:34]:34} {pyramid:8} {slide.grid.ladder.transition(level):10} {len(found):7}"
                    if len(found):
                        aligned, shifted = found.T
                        row += f" {np.median(aligned):7.1f} {aligned.min():7.1f} {np.median(shifted):8.1f}"
                    print(row)


def ratios(slide: AlignedSlide, level: int):  # type: ignore[no-untyped-def]
    """(PSNR, PSNR shifted by a pixel) of each parent of ladder level `level` that lies inside the slide and holds tissue."""
    step = slide.grid.ladder.steps[level]
    rows, columns = slide.grid.shape
    for i in range(rows):
        for j in range(columns):
            pixels = Footprint(slide, i, j)
            root = (i, j)
            for index in [root] if level == 0 else slide.grid.ladder.children(root):
                _, row, column = slide.grid.ladder.position(index)
                if not slide.grid.contains(level, row, column):
                    continue
                parent = pixels.tile(index)
                mpp = slide.plan.mpp * slide.plan.levels[level].downsample
                if parent is None or tissue_mask(parent, mpp=mpp, options=TissueConfig()).mean() < 0.5:
                    continue
                tiles = [pixels.tile(child) for child in slide.grid.ladder.children(index)]
                if any(tile is None for tile in tiles):
                    continue
                mosaic = np.vstack([np.hstack(tiles[n : n + step]) for n in range(0, step * step, step)])  # type: ignore[arg-type]
                average = cv2.resize(mosaic, parent.shape[:2], interpolation=cv2.INTER_AREA)
                yield cv2.PSNR(parent, average), cv2.PSNR(parent[:, 1:], average[:, :-1])


if __name__ == "__main__":
    main()
