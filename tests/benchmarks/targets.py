"""The models of the benchmarks, and the floors that issue 3 sets for each at a setting."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ZOO, EVAL = ROOT.parent / "shared" / "zoo", ROOT.parent / "shared" / "eval"


@dataclass(frozen=True)
class Model:
    """A model with its samples: an .npz or a folder of JPEGs."""

    name: str
    path: Path
    calibration: Path
    test: Path
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Floor:
    """The minimum of issue 3: output SQNR, top-1, and the maximum drop of top-1 below the float model."""

    sqnr: float | None = None
    top1: float | None = None
    drop: float | None = None
    effort: str = "default"

    def text(self) -> str:
        parts = {"{:g} dB": self.sqnr, "{:g} %": self.top1, "float-{:g}": self.drop}
        return ", ".join(form.format(value) for form, value in parts.items() if value is not None)

    def missed(self, figures: dict[str, Any]) -> bool:
        top1 = figures["top1"]
        return (
            (self.sqnr is not None and figures["sqnr_db"] < self.sqnr)
            or (self.top1 is not None and top1["quantized"] < self.top1)
            or (self.drop is not None and round(top1["float"] - top1["quantized"], 2) > self.drop)
        )


FLOORS = {
    ("resnet20", "W6A8"): Floor(29, 91.6),
    ("resnet20", "W4A8"): Floor(24, 91.4),
    ("resnet20", "W3A8"): Floor(16.5, 90.8),
    ("resnet20", "W2A8"): Floor(9, 86, effort="best"),
    ("resnet20", "W4A4"): Floor(16, 90.4),
    ("resnet20", "W3A3"): Floor(10.5, 87.5),
    ("mobilenet_v2", "W8A8"): Floor(18, drop=1.2),
    ("mobilenet_v2", "W4"): Floor(17, drop=2),
    ("mobilenet_v2", "W4A8"): Floor(14.5, drop=3),
    ("mobilenet_v2", "W3A8"): Floor(9.5, drop=10),
    ("mobilenet_v2", "W4A4"): Floor(top1=73, effort="best"),
    ("squeezenet1_1", "W4A8"): Floor(drop=1.5),
    ("orientation", "W4A8"): Floor(drop=1),
    ("ppocr_cls", "W4A8"): Floor(drop=1),
}


def models() -> list[Model]:
    """List all available models."""
    own = ROOT / "models"
    bundled = [
        Model(path.stem, path, own / "digits_calib.npz", own / "digits_test.npz", ("W8A8", "W4A8", "W3A8", "W4A4"))
        for path in sorted(own.glob("*.onnx"))
    ]
    if not (ZOO.is_dir() and EVAL.is_dir()):
        return bundled
    cifar, imagenet = ZOO / "cifar10", ZOO / "imagenet"
    resnet = ("W8A8", "W6A8", "W4A8", "W3A8", "W2A8", "W4A4", "W3A3", "W4A8u")
    mobilenet = ("W8A8", "W4", "W4A8", "W3A8", "W4A4")
    folders = imagenet / "calib", imagenet / "test"
    return [
        *bundled,
        Model("resnet20", cifar / "resnet20.onnx", cifar / "calib.npz", cifar / "test.npz", resnet),
        Model("mobilenet_v2", imagenet / "mobilenet_v2.onnx", *folders, mobilenet),
        Model("squeezenet1_1", imagenet / "squeezenet1_1.onnx", *folders, ("W4A8",)),
        *(
            Model(name, ZOO / name / "model.onnx", ZOO / name / "calib.npz", ZOO / name / "test.npz", ("W4A8",))
            for name in ("orientation", "ppocr_cls")
        ),
    ]
