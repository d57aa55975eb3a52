"""Files of ONNX and `torch.export`: how they are written, and what runs them."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .networks import Deployed, ExportError

Array = np.ndarray[Any, Any]
Run = Callable[[Array], list[Array]]  # images to outputs


def to_pt2(deployed: Deployed, images: Tensor, dynamic: bool, metadata: Mapping[str, str]) -> bytes:
    """Return the file of `torch.export.save` for a network and images of the file's size."""
    file = io.BytesIO()
    extra = {'metadata.json': json.dumps(dict(metadata))}
    torch.export.save(_captured(deployed, images, dynamic), file, extra_files=extra)
    return file.getvalue()


def to_onnx(
    deployed: Deployed, images: Tensor, dynamic: bool, metadata: Mapping[str, str]
) -> bytes:
    """Return the ONNX file for a network and images of the file's size.

    Raises:
        ExportError: If a package is missing.
    """
    with _needed('onnx', 'onnxscript'):
        import onnx
        from onnxscript import optimizer
    captured = _captured(deployed, images, dynamic)
    _broadcast_matrices(captured.graph)
    with _quiet():
        program: Any = torch.onnx.export(
            captured,
            input_names=['images'],
            output_names=deployed.names,
            dynamo=True,
            verbose=False,
        )
    # Fourier matrices are constants, whatever their size. By itself the exporter would leave their
    # computation in the file.
    largest = 2**31
    optimizer.optimize(program.model, input_size_limit=largest, output_size_limit=largest)
    model = program.model_proto
    onnx.helper.set_model_props(model, dict(metadata))
    content: bytes = model.SerializeToString()
    return content


def _captured(deployed: Deployed, images: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = {'images': {0: torch.export.Dim('batch')} if dynamic else {}}
    if dynamic and len(images) == 1:  # which would be taken for a constant
        images = images.repeat(2, 1, 1, 1)
    with torch.no_grad(), _quiet():
        return torch.export.export(deployed, (images,), dynamic_shapes=shapes)


def _broadcast_matrices(graph: torch.fx.Graph) -> None:
    """Let products broadcast their matrix: a file would hold a copy for every map of a batch."""
    for node in graph.find_nodes(op='call_function', target=torch.ops.aten.bmm.default):
        matrix, x = node.args
        if matrix.target is torch.ops.aten.expand.default:
            node.target, node.args = torch.ops.aten.matmul.default, (matrix.args[0], x)
    graph.eliminate_dead_code()


def quantized(content: bytes, batches: Iterable[Array]) -> bytes:
    """Return an ONNX file whose convolutions and linear layers compute in int8.

    This is ONNX Runtime's static quantization, by channel. Filters, norms and everything else stay
    in float32: rounded Fourier matrices cost accuracy and time, and OpenVINO 2026.4 fails to
    compile them.

    Args:
        content: The float32 file.
        batches: Images that determine the range of activations, uint8 `(B, H, W, 3)`.
    """
    with _needed('onnx', 'onnxruntime'):
        import onnx
        from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            images = next(self.batches, None)
            return None if images is None else {'images': images}

    model = onnx.load_from_string(content)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    # A linear layer multiplies maps with a constant, a filter a constant with maps.
    constants = {tensor.name for tensor in model.graph.initializer}
    filters = [n for n in model.graph.node if n.op_type == 'MatMul' and n.input[1] not in constants]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder, 'model.onnx')
        quantization.quantize_static(
            model,
            path,
            Reader(),
            op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
            nodes_to_exclude=[node.name for node in filters],
            per_channel=True,
        )
        model = onnx.load(path)
    onnx.helper.set_model_props(model, properties)
    result: bytes = model.SerializeToString()
    return result


@contextlib.contextmanager
def _needed(*packages: str) -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise ExportError(
            f"this needs {' and '.join(packages)} ({e}): pip install 'gfnet-dense[export]'"
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings of exporters about themselves from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(before)


def runs_of(content: bytes, suffix: str) -> tuple[dict[str, Run], dict[str, str]]:
    """Return what runs a file, by the name of the runtime, with as many threads as torch has.

    Returns:
        The runtimes; and why OpenVINO, where it is installed, cannot run the file.

    Raises:
        ExportError: If ONNX Runtime is missing.
    """
    if suffix == '.pt2':
        with _quiet():
            program = torch.export.load(io.BytesIO(content)).module()
        return {'torch.export': run_of(program)}, {}
    with _needed('onnxruntime'):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])
    runs: dict[str, Run] = {'ONNX Runtime': lambda images: session.run(None, {'images': images})}
    try:
        import openvino

        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(content),
            'CPU',
            # Without this hint a processor with bfloat16 would round to it.
            dict(INFERENCE_PRECISION_HINT='f32', INFERENCE_NUM_THREADS=torch.get_num_threads()),
        )
    except ImportError:
        return runs, {}
    except RuntimeError as e:
        return runs, {'OpenVINO': ' '.join(str(e).split())}
    # Outputs are views into memory that the next call overwrites.
    runs['OpenVINO'] = lambda images: [y.copy() for y in compiled(images).values()]
    return runs, {}


def run_of(module: nn.Module) -> Run:
    """Return what runs a module of PyTorch."""

    @torch.inference_mode()
    def run(images: Array) -> list[Array]:
        return [y.numpy() for y in module(torch.from_numpy(images))]

    return run
