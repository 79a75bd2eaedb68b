"""The benchmark counts, compares and reports as it says. No test depends on how fast anything is."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.backbones.nat import NAT
from visionattn.backbones.nat import checkpoint_filter_fn as nat_filter_fn
from visionattn.backbones.van import VAN, checkpoint_filter_fn
from visionattn.benchmark import cli, models, ops
from visionattn.benchmark.cli import main
from visionattn.benchmark.measure import Timer, compare, count_flops, one_line, peak_memory, time_interleaved
from visionattn.benchmark.models import plain_and_ours, randomize_
from visionattn.benchmark.neighborhood import flex_mods, masked_sdpa
from visionattn.benchmark.plain.nat import PlainNAT
from visionattn.benchmark.plain.van import PlainVAN
from visionattn.benchmark.report import Report, describe, format_rows, markdown_rows, write_atomic
from visionattn.benchmark.runner import Candidate, Case, Settings, Workload, run_case
from visionattn.kernels import neighborhood_attention

CPU = torch.device("cpu")
TINY = ((8, 16, 24, 32), (1, 2, 1, 1), (2, 2, 2, 2))


def failing(*_):
    raise RuntimeError("needs a GPU\nand a long second line")


def workload(function):
    x = torch.ones(4, requires_grad=True)
    return Workload(function, (x,), (x,), lambda: [x.grad])


def case_of(**functions):
    candidates = [Candidate(name, lambda mode, f=f: workload(f)) for name, f in functions.items()]
    return Case("square", "4", candidates)


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other on a busy machine would take most of the time of these small shapes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings():
    return Settings(CPU, repeats=3, seconds=10.0)


# Timing


def test_calls_take_turns_in_the_given_order():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples, failures = time_interleaved(functions, Timer(CPU), repeats=4, seconds=10.0)
    assert "".join(calls) == "abcabcabcabc"
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert not failures


def test_time_limit_still_leaves_three_rounds():
    samples, _ = time_interleaved({"a": lambda: None}, Timer(CPU), repeats=50, seconds=1e-9)
    assert len(samples["a"]) == 3


def test_call_that_fails_while_timed_drops_out_alone():
    count = iter(range(10))
    samples, failures = time_interleaved(
        {"bad": lambda: failing() if next(count) == 1 else None, "good": lambda: None}, Timer(CPU), 4, 10.0
    )
    assert failures == {"bad": "needs a GPU"}
    assert list(samples) == ["good"] and len(samples["good"]) == 4


def test_ratio_spread_and_order_statistics(monkeypatch, settings):
    monkeypatch.setattr(
        "visionattn.benchmark.runner.time_interleaved",
        lambda *_: ({"a": [0.004, 0.002, 0.006], "b": [0.001, 0.001, 0.002]}, {}),
    )
    a, b = run_case(case_of(a=torch.square, b=torch.square), "infer", settings)
    assert (a.median_ms, a.min_ms, a.samples) == (4.0, 2.0, 3)
    assert a.spread == pytest.approx(0.5)  # quartiles 3 and 5
    assert a.baseline and a.speedup == 1.0 and b.speedup == pytest.approx(4.0)
    settings.baseline = "b"
    a, b = run_case(case_of(a=torch.square, b=torch.square), "infer", settings)
    assert b.baseline and a.speedup == pytest.approx(0.25)


def test_gpu_timer_fills_the_device_before_the_first_event(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.0

    class Buffer:
        def zero_(self):
            log.append("fill")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer())
    timer = Timer(torch.device("cuda"), device_time=True)
    log.clear()
    assert timer(lambda: log.append("call"), launch_seconds=0.003) == pytest.approx(0.002)
    assert log == ["fill"] * 4 + ["event", "call", "event", "wait"]  # 2 ms each, to cover twice 3 ms
    log.clear()
    assert Timer(torch.device("cuda"))(lambda: log.append("call")) == pytest.approx(0.002)
    assert log == ["event", "call", "event", "wait"]


# Counting


def test_peak_memory_counts_what_lives_at_the_same_time():
    def call():
        first = torch.empty(1000, 250)  # 1 MB
        second = torch.empty(1000, 250)
        del first
        third = torch.empty(1000, 125)
        return second.numel() + third.numel()

    assert peak_memory(call, CPU) == 2_000_000


def test_flops_of_a_convolution():
    x, weight = torch.randn(2, 8, 10, 12), torch.randn(16, 4, 3, 3)
    macs = 2 * 16 * 10 * 12 * 4 * 9
    assert count_flops(lambda: F.conv2d(x, weight, padding=1, groups=2)) == 2 * macs


def test_byte_floor_reads_inputs_once_and_writes_outputs_once():
    work = workload(torch.square)
    out = work.infer()
    assert work.minimum_bytes("infer", out) == 2 * 16
    assert work.minimum_bytes("train", out) == (2 + 2 + 1) * 16  # x twice, out and its gradient, gradient of x


# Comparing


def test_compare_reports_largest_and_two_norm_difference():
    largest, l2 = compare([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])])
    assert largest == pytest.approx(0.125) and l2 == pytest.approx(0.1)
    assert compare([torch.tensor([math.nan])], [torch.ones(1)]) == (math.inf, math.inf)
    with pytest.raises(ValueError, match="shapes"):
        compare([torch.ones(2)], [torch.ones(3)])


def test_wrong_output_and_wrong_gradient_are_flagged(settings):
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return grad  # should be 2 x grad

    case = case_of(right=torch.square, same=lambda x: x * x, off=lambda x: 1.01 * x * x, gradient=WrongGradient.apply)
    rows = {row.candidate: row for row in run_case(case, "infer", settings)}
    assert [name for name, row in rows.items() if row.differs] == ["off"]
    assert rows["off"].error == pytest.approx(0.01, rel=1e-3) and rows["right"].error is None
    rows = {row.candidate: row for row in run_case(case, "train", settings)}
    assert [name for name, row in rows.items() if row.differs] == ["off", "gradient"]
    (nan,) = (
        row for row in run_case(case_of(a=torch.square, b=lambda x: x / 0), "infer", settings) if not row.baseline
    )
    assert nan.differs and nan.error is None and nan.reason == "NaN or Inf in the result"
    settings.tolerance = 0.02
    assert not any(row.differs for row in run_case(case, "infer", settings))


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_candidate_that_cannot_run_says_why_and_disturbs_no_other(settings, mode):
    a, bad, b = run_case(case_of(a=torch.square, bad=failing, b=torch.square), mode, settings)
    assert bad.reason == "n/a: needs a GPU" and bad.median_ms is None
    assert a.samples == b.samples == 3 and b.error == 0.0
    assert "n/a: needs a GPU" in format_rows([a, bad, b])


def test_failed_baseline_leaves_times_without_ratios(settings):
    bad, good = run_case(case_of(bad=failing, good=torch.square), "infer", settings)
    assert bad.baseline and good.median_ms and good.speedup is None


# Reporting


def test_report_round_trips_and_tables_are_aligned(settings):
    rows = run_case(case_of(short=torch.square, much_longer=lambda x: x * x, bad=failing), "infer", settings)
    report = Report(describe("command --line", CPU, "float32"), rows)
    assert Report.from_json(report.to_json()) == report
    header = json.loads(report.to_json())["header"]
    needed = {"command", "device", "cpu", "threads", "dtype", "clock", "python", "torch", "timm", "triton", "date"}
    assert needed <= header.keys()
    title, *lines = format_rows(rows).splitlines()
    end = title.index("median ms") + len("median ms")
    assert all(line[end - 1] != " " and line[end] == " " for line in lines)
    assert markdown_rows(rows).count("\n| ") == 2 + len(rows)


def test_files_are_replaced_whole(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(TypeError):
        write_atomic(target, None)
    assert target.read_text() == "old"
    write_atomic(target, "new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_reasons_are_one_short_line():
    assert one_line(RuntimeError("a\nb")) == "a"
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(MemoryError()) == "MemoryError"
    assert len(one_line(RuntimeError("x" * 1000))) == 160


# Command line


def run(capsys, *argv):
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_ops_prints_a_table_and_writes_json(capsys, tmp_path):
    target = tmp_path / "ops.json"
    arguments = "ops lka --sizes 6x5x8 --batch 1 --repeats 2 --check --candidates reference,torch+channels_last,triton"
    status, out, _ = run(capsys, *arguments.split(), "--json", str(target))
    assert status == 0
    assert out.startswith(f"$ python -m visionattn.benchmark {arguments}")
    assert "lka 1x6x5x8 infer" in out and "lka 1x6x5x8 train" in out
    report = Report.from_json(target.read_text())
    assert [row.candidate for row in report.rows] == 2 * ["reference", "torch+channels_last", "triton"]
    assert report.rows[2].reason.startswith("n/a: ") and report.rows[0].gmac > 0
    assert report.rows[1].error < 1e-5


@pytest.mark.parametrize("name", ops.OPS)
def test_every_registered_operator_runs_and_agrees(capsys, name):
    arguments = f"ops {name} --sizes 7x9x32 --batch 2 --repeats 1 --check --candidates reference,torch"
    assert run(capsys, *arguments.split())[0] == 0


def test_a_new_operator_is_one_decorated_function(capsys, monkeypatch):
    monkeypatch.setattr(ops, "OPS", {})
    monkeypatch.setattr(cli, "OPS", ops.OPS)

    @ops.op_benchmark("double", candidates=("add", "wrong"))
    def double(batch, size, rand):
        """Twice the input."""
        x = rand(batch, size.height * size.width, size.channels)
        return ops.OpCase((x,), {"add": lambda x: x + x, "times": lambda x: 2 * x, "wrong": lambda x: 2.1 * x})

    status, _, err = run(capsys, *"ops double --sizes 2x2x4 --repeats 1 --mode infer --check".split())
    assert status == 1 and "check failed: double 2x2x2x4 infer: wrong" in err
    arguments = "ops --sizes 2x2x4 --repeats 1 --mode train --check --candidates add,times,times+channels_last"
    status, out, _ = run(capsys, *arguments.split())
    assert status == 0 and "n/a: channels_last needs an input [B, C, H, W]" in out


def test_compiled_candidate_runs(capsys):
    arguments = "ops depthwise5 --sizes 6x5x8 --batch 1 --repeats 1 --mode infer --check --candidates"
    status, out, _ = run(capsys, *arguments.split(), "reference,reference+compile")
    assert status == 0 and "n/a" not in out


def test_models_compares_ours_with_plain_and_times_others(capsys):
    arguments = "models van_b0 --img-size 32,40 --batch 2 --mode infer,train --repeats 1 --check --candidates"
    status, out, _ = run(capsys, *arguments.split(), "plain,ours,resnet10t")
    assert status == 0 and "n/a" not in out
    assert all(out.count(f"\n{candidate} ") == 4 for candidate in ("plain *", "ours", "resnet10t"))
    assert "van_b0 2x3x40x40 train" in out and "GMAC/img" in out


def test_model_without_plain_counterpart_still_runs(capsys):
    arguments = "models resnet18 --img-size 32 --batch 1 --mode infer --repeats 1 --candidates plain,ours"
    status, out, _ = run(capsys, *arguments.split())
    assert status == 0 and "n/a: no plain network is registered for 'resnet18'" in out


def test_models_of_timm_are_compared_with_our_attention_in_them(capsys):
    arguments = "models vit_tiny_patch16_224 --img-size 32 --batch 1 --repeats 1 --mode infer --check --candidates"
    status, out, err = run(capsys, *arguments.split(), "timm,converted,converted_linear")
    assert status == 0 and "n/a" not in out, out + err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("ops lkaa", "unknown operator 'lkaa'; did you mean lka"),
        ("ops lka --sizes 3x3", "HEIGHTxWIDTHxCHANNELS"),
        ("ops lka --sizes van", "allowed are van_b0, van_b2, nat_tiny"),
        ("ops lka --candidates torhc", "allowed are reference, torch, triton"),
        ("ops lka --candidates torch+compil", "allowed are channels_last, compile"),
        ("ops lka --candidates torch --baseline reference", "unknown baseline 'reference'; allowed are torch"),
        ("ops --mode trian", "unknown mode 'trian'; allowed are infer, train"),
        ("ops --batch 0", "'0' is not a positive integer"),
        ("ops --json no/such/folder/a.json", "does not exist"),
        ("models van_bO", "did you mean van_b"),
        ("models --candidates plan", "did you mean plain"),
        ("models --img-size 22a", "'22a' is not a positive integer"),
        ("models --amp", "--amp needs --dtype bfloat16 or float16, not float32"),
        ("opps", "choose from"),
    ],
)
def test_bad_arguments_end_in_one_line_with_what_is_allowed(capsys, arguments, words):
    status, out, err = run(capsys, *arguments.split())
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_gpu_set_is_made_of_valid_arguments(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for section in cli.GPU_SET:
        args = cli._build_parser().parse_args(section.split())
        assert cli._plan(args).cases


def test_gpu_set_survives_a_bad_section_and_writes_both_files(capsys, tmp_path):
    args = cli._build_parser().parse_args(["gpu", "--out", str(tmp_path / "results")])
    sections = [
        "ops lka --sizes 4x4x8 --batch 1 --repeats 1 --mode infer --candidates reference,torch",
        "ops no_such_operator",
        "models van_b0 --img-size 32 --batch 1 --repeats 1 --mode infer --candidates plain,ours",
    ]
    assert cli._run_gpu(args, sections) == 1
    files = {path.suffix: path.read_text() for path in (tmp_path / "results").iterdir()}
    report = Report.from_json(files[".json"])
    assert [row.case for row in report.rows] == ["lka", "lka", "van_b0", "van_b0"]
    assert all(f"`{section}`" in files[".md"] for section in sections)
    assert "n/a: unknown operator" in files[".md"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("arguments", ["gpu", "ops --device cuda", "models --device cuda"])
def test_gpu_asked_for_where_there_is_none(capsys, arguments):
    status, _, err = run(capsys, *arguments.split())
    assert status == 2 and "torch sees no GPU" in err


def test_importing_the_library_leaves_the_benchmark_alone():
    code = "import sys, visionattn; sys.exit(any(name.startswith('visionattn.benchmark') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# The plain counterparts


def test_plain_van_reproduces_the_authors_recorded_output():
    fixture = load_fixture("van/van_b0")
    plain = models.PLAIN["van"]("van_b0").eval()
    assert {name: list(shape) for name, shape in fixture["params"]} == {
        name: list(value.shape) for name, value in plain.state_dict().items() if not name.endswith("batches_tracked")
    }
    plain.load_state_dict(fixture_weights(fixture), strict=False)
    with torch.inference_mode():
        output = plain(fixture_image(fixture))
    assert relative_error(output, torch.tensor(fixture["output"]["values"])) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_plain_van_equals_ours_with_the_same_weights(training):
    dims, depths, ratios = TINY
    plain = randomize_(PlainVAN(dims, depths, ratios, num_classes=7)).train(training)
    ours = VAN(embed_dims=dims, depths=depths, mlp_ratios=ratios, num_classes=7).train(training)
    ours.load_state_dict(checkpoint_filter_fn(plain.state_dict(), ours))
    x = torch.randn(3, 3, 77, 49)
    outputs = [model(x) for model in (plain, ours)]
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    grads = checkpoint_filter_fn({name: p.grad for name, p in plain.named_parameters()}, ours)
    for name, p in ours.named_parameters():
        scale = grads[name].abs().max().item()
        torch.testing.assert_close(p.grad, grads[name], rtol=0, atol=1e-4 * scale + 1e-4, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", ["nat/nat_mini_pad_256x192", "dinat/dinat_mini"])
def test_plain_nat_reproduces_the_authors_recorded_output(name):
    fixture = load_fixture(name)
    plain = models.PLAIN["nat"](name.split("/")[1].removesuffix("_pad_256x192")).eval()
    plain.load_state_dict(fixture_weights(fixture))
    with torch.inference_mode():
        output = plain(fixture_image(fixture))
    assert relative_error(output, torch.tensor(fixture["output"]["values"])) < 2e-6


@pytest.mark.parametrize(
    "name",
    [pytest.param("cswin/cswin_tiny_224", marks=pytest.mark.slow), "pvt/pvt_tiny", "transnext/transnext_micro"],
)
def test_plain_pyramids_reproduce_the_authors_recorded_output(name):
    fixture, (family, model) = load_fixture(name), name.split("/")
    plain = models.PLAIN[family](model).eval()
    plain.load_state_dict(fixture_weights(fixture))
    with torch.inference_mode():
        output = plain(fixture_image(fixture))
    assert relative_error(output, torch.tensor(fixture["output"]["values"])) < 2e-6


def test_plain_slab_trains_as_ours_does():
    plain, ours = models.plain_and_ours("slab_swin_t")
    x, outputs = torch.randn(1, 3, 224, 224), []
    for model in (plain.train(), ours.train()):
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    assert relative_error(outputs[1], outputs[0]) < 1e-5
    expected = models._gradients(plain, partial(models._names_of_ours, "slab_swin_t"))
    assert relative_error(models._gradients(ours, dict)[0], expected[0]) < 1e-4


@pytest.mark.parametrize(
    "name", ["agent", *(pytest.param(name, marks=pytest.mark.slow) for name in ("inline", "flatten", "pola", "slab"))]
)
def test_plain_swin_reproduces_the_authors_recorded_output(name):
    fixture = load_fixture(f"{name}/{name}_swin_t")
    plain = models.PLAIN[f"{name}_swin_t"](f"{name}_swin_t").eval()
    missing, unexpected = plain.load_state_dict(fixture_weights(fixture), strict=False)
    counted = ("index", "mask", "batches_tracked", "warm", "iter", "total_step")  # no parameters
    assert not unexpected and all(key.endswith(counted) for key in missing)
    with torch.inference_mode():
        output = plain(fixture_image(fixture))
    assert relative_error(output, torch.tensor(fixture["output"]["values"])) < 2e-6


def test_plain_nat_equals_ours_with_the_same_weights():
    plain = randomize_(PlainNAT(32, (1, 2, 1, 1), 2.0, True, ((1, 1), (1, 2), (2, 1), (1, 1)), num_classes=7))
    dilations = ((1,), (1, 2), (2,), (1,))
    heads, depths = (1, 2, 4, 8), (1, 2, 1, 1)
    ours = NAT(3, 7, "avg", 32, depths, heads, dilations=dilations, mlp_ratio=2.0, layer_scale=1e-5)
    ours.load_state_dict(nat_filter_fn(plain.state_dict(), ours))
    x = torch.randn(2, 3, 77, 49)
    outputs = [model(x) for model in (plain, ours)]
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    grads = nat_filter_fn({name: p.grad for name, p in plain.named_parameters()}, ours)
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, grads[name]) < 1e-3, name  # sums over all positions in another order


@pytest.mark.parametrize("biased", [True, False])
def test_flex_attention_is_given_the_same_windows(biased):
    qkv, bias = torch.randn(1, 15, 16, 3, 2, 16), torch.randn(2, 13, 13) if biased else None
    mask_mod, score_mod = flex_mods((15, 16), bias, 7, 2, CPU)
    blocks = create_block_mask(mask_mod, None, None, 240, 240, device="cpu")
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in qkv.unbind(3))
    out = flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks).transpose(1, 2).unflatten(1, (15, 16))
    expected = neighborhood_attention(*qkv.unbind(3), 7, 2, bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked_sdpa(qkv, bias, 7, 2), expected, rtol=1e-4, atol=1e-5)


def test_plain_and_ours_share_weights_that_all_matter():
    plain, ours = plain_and_ours("van_b0", 32)
    assert isinstance(plain, PlainVAN) and sum(p.numel() for p in ours.parameters()) == 4_105_800
    torch.testing.assert_close(plain.head.weight, ours.head.fc.weight, rtol=0, atol=0)
    neutral = [n for n, t in plain.state_dict().items() if t.dim() == 1 and (t.unique().numel() == 1)]
    assert not neutral


def test_feature_maps_are_measured_beside_other_pyramids(capsys):
    arguments = "models van_b0 --features --candidates ours,test_resnet --img-size 64 --batch 1 --mode infer,train"
    assert main([*arguments.split(), "--repeats", "1", "--seconds", "0.1"]) == 0
    shown = capsys.readouterr().out
    assert "ours" in shown and "test_resnet" in shown and "n/a" not in shown
    assert main("models van_b0 --features --candidates plain".split()) == 2
    assert "plain has no feature maps" in capsys.readouterr().err
