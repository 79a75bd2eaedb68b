"""Whole models on a GPU compute what they compute on the CPU, in every mode a user trains or predicts in."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn  # noqa: F401
from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.benchmark import cli
from visionattn.benchmark.models import plain_and_ours, randomize_
from visionattn.benchmark.report import Report
from visionattn.kernels import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

# One model a family is enough here: the kernels have their own tests, these look at what joins them.
NAMES = ["van_b0", "nat_mini", "biformer_tiny", "ravlt_t", "mavit_t", "litv2_small"]
SIZES = [(96, 96), (97, 131)]  # the odd one leaves remainders in every tile and stride


@pytest.fixture(autouse=True)
def _exact_float32():
    """TF32 rounds to ten bits; the comparisons below are of float32 with float32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=NAMES)
def model(request):
    """On the CPU, with weights that all show in the output, in evaluation mode."""
    return randomize_(timm.create_model(request.param)).eval()


def images(size=(96, 96), batch=4):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def on_gpu(model):
    return copy.deepcopy(model).cuda()


def step(model, x):
    """Output and all gradients of one step, on the CPU."""
    out = model(x)
    target = torch.arange(len(x), device=x.device)
    F.cross_entropy(out.float(), target).backward()
    return out.detach().cpu(), torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])


@pytest.mark.parametrize("size", SIZES)
def test_forward_equals_cpu(model, size):
    x = images(size)
    with torch.inference_mode():
        expected = model(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            out = on_gpu(model)(x.cuda().contiguous(memory_format=layout))
            assert relative_error(out.cpu(), expected) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_equal_cpu(model, size, training):
    x = images(size)
    out, grads = step(on_gpu(model).train(training), x.cuda())
    expected_out, expected_grads = step(model.train(training), x)
    assert relative_error(out, expected_out) < 1e-4
    assert relative_error(grads, expected_grads) < 1e-3  # batch statistics amplify the rounding of long sums


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_every_backend_gives_the_same_step(model, backend):
    x = images().cuda()
    with use_backend(backend):
        out, grads = step(on_gpu(model), x)
    expected_out, expected_grads = step(on_gpu(model).double(), x.double())
    assert relative_error(out, expected_out) < 1e-5
    assert relative_error(grads, expected_grads) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_near_float32(model, dtype):
    x = images().cuda()
    with torch.inference_mode():
        expected = on_gpu(model)(x)
        out = on_gpu(model).to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out, expected) < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_step_stays_near_float32(model, dtype):
    x = images().cuda()
    expected_out, expected_grads = step(on_gpu(model).train(), x)
    network = on_gpu(model).train()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16, init_scale=1024.0)
    with torch.autocast("cuda", dtype=dtype):
        out = network(x)
        loss = F.cross_entropy(out, torch.arange(len(x), device="cuda"))
    scaler.scale(loss).backward()
    grads = torch.cat([p.grad.flatten().cpu() for p in network.parameters()]) / scaler.get_scale()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
    assert relative_error(out.cpu(), expected_out) < 5e-2
    assert relative_error(grads, expected_grads) < 2e-1


def test_compiled_in_one_graph_equals_eager(model):
    x = images().cuda()
    torch.compiler.reset()
    with torch.inference_mode():
        expected = on_gpu(model)(x)
        out = torch.compile(on_gpu(model), fullgraph=True, dynamic=False)(x)
    assert relative_error(out, expected) < 1e-4


def test_compiled_training_step_equals_eager(model):
    x = images().cuda()
    torch.compiler.reset()
    expected_out, expected_grads = step(on_gpu(model).train(), x)
    network = on_gpu(model).train()
    compiled = torch.compile(network, fullgraph=True, dynamic=False)
    out = compiled(x)
    F.cross_entropy(out, torch.arange(len(x), device="cuda")).backward()
    grads = torch.cat([p.grad.flatten().cpu() for p in network.parameters()])
    assert relative_error(out.cpu(), expected_out) < 1e-4
    assert relative_error(grads, expected_grads) < 1e-3


def test_cuda_graph_replays_the_forward(model):
    network, x = on_gpu(model), images().cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            network(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        with torch.cuda.graph(graph):
            out = network(x)
        x.copy_(images().flip(0))
        graph.replay()
        assert relative_error(out, network(x)) < 1e-6


def test_gradient_checkpointing_gives_the_same_gradients(model):
    x = images().cuda()
    expected = step(on_gpu(model), x)[1]
    network = on_gpu(model)
    network.set_grad_checkpointing()
    assert relative_error(step(network, x)[1], expected) < 1e-5


def test_short_training_lowers_the_loss(model):
    network = on_gpu(model).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    x, target = images(batch=8).cuda(), torch.arange(8, device="cuda")
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = F.cross_entropy(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", ["van/van_b0", "litv2/litv2_small"])
def test_gpu_reproduces_the_authors_recorded_output(name, tmp_path):
    fixture = load_fixture(name)
    file = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": fixture_weights(fixture)}, file)
    network = timm.create_model(name.split("/")[1], pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    with torch.inference_mode():
        out = network.eval().cuda()(fixture_image(fixture).cuda())
    assert relative_error(out.cpu(), torch.tensor(fixture["output"]["values"])) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_plain_composition_agrees(name):
    plain, ours = (network.eval().cuda() for network in plain_and_ours(name))
    x = images((224, 224)).cuda()
    with torch.inference_mode():
        assert relative_error(ours(x), plain(x)) < 1e-5


@pytest.mark.parametrize(
    "arguments",
    [
        "ops --sizes 14x14x32 --batch 2 --repeats 2 --candidates reference,torch+channels_last,triton+channels_last",
        "models van_b0 --img-size 64 --batch 2 --repeats 2 --candidates plain,ours,resnet18",
    ],
)
def test_benchmark_runs_and_agrees(arguments, tmp_path):
    target = tmp_path / "out.json"
    assert cli.main([*arguments.split(), "--device", "cuda", "--check", "--json", str(target)]) == 0
    report = Report.from_json(target.read_text())
    assert all(row.median_ms for row in report.rows), [row.reason for row in report.rows]
    assert report.header["gpu"]
    if arguments.startswith("ops"):
        assert report.header["copy_gb_per_s"] > 0 and all(row.floor_ms for row in report.rows)
