"""Draw docs/images/scenes.png: scenes of digits with their boxes, as `DigitScenes` makes them for training."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dlref.data.scenes import make_scenes
from dlref.data.small_images import digit_pools

ROWS, COLUMNS, SIDE = 2, 8, 96


def main() -> None:
    """Draw and save the figure, with one scene per cell."""
    scenes = make_scenes(*digit_pools()["train"], ROWS * COLUMNS, SIDE, seed=0)
    figure = Figure(figsize=(1.5 * COLUMNS, 1.5 * ROWS), layout="constrained")
    for axes, image, boxes, labels in zip(
        figure.subplots(ROWS, COLUMNS).flat, scenes.images, scenes.boxes.tolist(), scenes.labels.tolist(), strict=True
    ):
        axes.set_axis_off()
        axes.imshow(image.permute(1, 2, 0), extent=(0, SIDE, SIDE, 0))
        for (left, top, right, bottom), label in zip(boxes, labels, strict=True):
            if label >= 0:
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="yellow"))
                name = {"facecolor": "yellow", "pad": 0.5, "linewidth": 0}
                axes.text(left, top, label, fontsize=6, va="bottom", bbox=name)
    figure.savefig(Path(__file__).parent / "images" / "scenes.png", dpi=80)


if __name__ == "__main__":
    main()
