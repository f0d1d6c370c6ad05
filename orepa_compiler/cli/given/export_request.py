"""Holds what orepa-export was asked for, and reads the data that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orepa_compiler.choices import Flavor, Precision, Preset, Weights
from orepa_compiler.cli.given.forward_arguments import Batch
from orepa_compiler.cli.given.images import ImageOptions
from orepa_compiler.cli.given.inputs import check_source, load_inputs
from orepa_compiler.cli.given.models import floating_type, inputs_for, named_block, typed_shape
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError, ReparamError
from orepa_compiler.export.int8.quantization import calibration_batches
from orepa_compiler.export.onnx.precision import cast_tensors
from orepa_compiler.export.onnx.program import returned_names
from orepa_compiler.export.onnx.sizes import check_images, other_sizes
from orepa_compiler.export.tensorrt.flavors import load_flavor
from orepa_compiler.export.tensorrt.profiles import Shape
from orepa_compiler.model_source import check_function, check_options
from orepa_compiler.model_source.preprocessing import Preprocessing, preprocessing_of
from orepa_compiler.verification.nesting import tensors_in

# Samples in one call while the ranges are taken.
CALIBRATION_BATCH = 8


@dataclass(frozen=True)
class ExportRequest:
    """What orepa-export was asked for.

    shapes: of the inputs, without the batch, as written; none where the model's own are taken.
    batch: of the inputs compared; None is 1 where the artifacts keep it, and 2 where it is free, so
    that more than one image is really compared. data: the user's own inputs, to be compared beside
    random ones of their shape. input_names, output_names: in the files; none for those of the
    model. images: how images become inputs. calibration: where the data for int8 comes from.
    int8_preset: what runs it; None is the model's own, or TensorRT. evaluate: the user's function
    that tells how good a form is. profile: the shapes that the engine takes. report: where a page
    goes, for which the models are measured.
    """

    model: str
    onnx: Path
    checkpoint: Path | None = None
    weights: Weights | None = None
    pretrained: bool = False
    num_classes: int | None = None
    expanded: str | None = None
    engine: Path | None = None
    openvino: Path | None = None
    shapes: tuple[str, ...] = ()
    batch: int | None = None
    precision: Precision = "fp32"
    static_batch: bool = False
    dynamic_size: bool = False
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    simplify: bool = False
    opset: int | None = None
    flavor: Flavor = "auto"
    compute_capability: str | None = None
    allow_pickle: bool = False
    data: str | None = None
    images: ImageOptions = field(default_factory=ImageOptions)
    evaluate: str | None = None
    keep_fp32: tuple[str, ...] = ()
    calibration: str | None = None
    int8_preset: Preset | None = None
    profile: dict[str, tuple[Shape, ...]] | tuple[Shape, ...] | None = None
    workspace_gb: float | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    report: Path | None = None
    command: str = ""

    def check(self) -> None:
        """Raises ReparamError for what can be seen to be wrong before the model is loaded."""
        for text in self.shapes:
            typed_shape(text)
        check_options(self.model, self.pretrained, self.num_classes)
        if self.expanded is not None:
            named_block(self.expanded, option="--expanded")
        for option, source in (("--inputs", self.data), ("--calibration", self.calibration)):
            if source is not None:
                check_source(source, option)
        if self.images.given and self.data is None and self.calibration is None:
            raise ReparamError("--resize, --crop, --mean, --std: there are no images; leave it out")
        if self.evaluate is not None:
            check_function(self.evaluate)
        self._check_packages()

    def _check_packages(self) -> None:
        packages = {"onnx": "onnx", "onnx_ir": "onnx", "onnxscript": "onnx"}
        packages |= {"onnxsim": "simplify"} if self.simplify else {}
        packages |= {"openvino": "openvino"} if self.openvino else {}
        for package, extra in packages.items():
            import_extra(package, extra=extra)
        if self.engine is not None:
            load_flavor(self.flavor)

    def inputs(self, model: nn.Module) -> list[Batch]:
        """The batches that every form is compared on."""
        batch = self.batch or (1 if self.static_batch else 2)
        if self.data is None:
            return [inputs_for(self.model, model, self.shapes or self._of_the_crop(model), batch)]
        batches = self._load(self.data, batch, "--inputs", model)
        # A file with a fixed batch takes no smaller one.
        full = [given for given in batches if _size(given) == batch]
        if self.static_batch and not full:
            raise ReparamError(f"--inputs {self.data}: holds no batch of {batch} samples")
        return full if self.static_batch else batches

    def check_interface(self, model: nn.Module, batch: Batch, given: Any) -> None:
        """Raises ReparamError for names that do not fit the model, and for a size that is fixed.

        given: what the model returned on the batch.
        """
        names, count = self.input_names, len(list(tensors_in(batch)))
        if names and len(names) != count:
            raise ReparamError(
                f"--input-names {','.join(names)}: names {len(names)} inputs, and the model takes "
                f"{count}; give one name for each"
            )
        self._check_output_names(given)
        if self.dynamic_size:
            try:
                check_images(batch)
                next(other_sizes(model, batch))
            except ExportError as error:
                raise ReparamError(str(error).replace("dynamic_size", "--dynamic-size")) from error

    def _check_output_names(self, given: Any) -> None:
        names, (own, is_named) = self.output_names, returned_names(given)
        asked = f"--output-names {','.join(names)}"
        if names and is_named:
            raise ReparamError(
                f"{asked}: the model returns its outputs by name ({', '.join(own)}), and they are "
                "compared by these names; rename the keys in its forward, or leave it out"
            )
        if names and own and len(names) != len(own):
            raise ReparamError(
                f"{asked}: names {len(names)} outputs, and the model returns {len(own)} "
                f"({', '.join(own)}); give one name for each"
            )
        for name in self.input_names:
            if name in own and not names:
                raise ReparamError(
                    f"--input-names {','.join(self.input_names)}: {name!r} is the name of an "
                    "output; give another, or --output-names"
                )

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """How images become inputs of this model."""
        known = preprocessing_of(self.model, model)
        if self.shapes:
            known = known.at(typed_shape(self.shapes[0])[0])
        return self.images.over(known)

    def calibrating(self, model: nn.Module, like: Batch, *, is_trained: bool) -> list[Batch]:
        """The batches of calibration data; none where none are named.

        is_trained: the model has the ranges that it was trained with, so int8 needs none.
        Raises ReparamError for int8 without any, and for batches of other shapes than the inputs.
        """
        if self.calibration is None and self.precision == "int8" and not is_trained:
            raise ReparamError(
                "--precision int8 takes the ranges of the values from your data: give "
                "--calibration FOLDER of images or .npy files, or path/to/file.py:function that "
                "gives batches"
            )
        if self.calibration is None:
            return []
        size = _size(like) if self.static_batch else CALIBRATION_BATCH
        batches = self._load(self.calibration, size, "--calibration", model)
        try:
            batches = calibration_batches(batches, like)
        except ExportError as error:
            if self.shapes or self.data is not None:
                raise
            raise ReparamError(f"{error}; give the shape of your data as --input-shape") from error
        if not self.static_batch:
            return batches
        full = [batch for batch in batches if _size(batch) == size]
        if not full:
            raise ReparamError(
                f"--calibration {self.calibration}: gives no batch of {size}, which --static-batch "
                "asks for"
            )
        return full

    def _of_the_crop(self, model: nn.Module) -> tuple[str, ...]:
        """The shape that --crop makes of images: calibration data then fits the inputs."""
        if self.images.crop is None:
            return ()
        return ("x".join(map(str, self.preprocessing(model).shape)),)

    def _load(self, source: str, batch: int, option: str, model: nn.Module) -> list[Batch]:
        images = self.preprocessing(model)
        found = load_inputs(source, batch, option=option, images=images, model=model)
        # A model in half precision takes its inputs in that.
        typed: list[Batch] = cast_tensors(found, floating_type(model))
        return typed


def _size(batch: Any) -> int:
    first = next((value for value in batch if isinstance(value, Tensor) and value.ndim), None)
    return 0 if first is None else len(first)
