"""The rules of the measurement, on a fake clock; no test asserts a speed."""

import dataclasses
import functools
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn

import bonn_qat
from bonn_qat import cli, environment, plotting
from bonn_qat.bench import BACKENDS, Backend, BackendMissing, InvalidBenchmark, Launch, Networks, engines, measure
from bonn_qat.bench import bench as bench_
from bonn_qat.bench import startup as start
from bonn_qat.bench.report import BenchReport, Startup
from bonn_qat.errors import UnknownName

NET = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
SIZE = (3, 2, 2)
WARMING = measure.WARMUP + 1  # calls of a backend before the first round, its turn there being one call long


class Clock:
    """Time that passes in calls alone, as many seconds as a backend says; and who was called, with how many threads."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int, int]] = []  # backend, threads, batch

    def __call__(self) -> float:
        return self.now

    def backend(self, name: str, *seconds: float) -> Callable[[Networks], Backend]:
        """A fake whose calls take ``seconds``, one after the other and from the beginning again."""
        durations = itertools.cycle(seconds)

        def run(batch: int) -> None:
            self.calls.append((name, torch.get_num_threads(), batch))
            self.now += next(durations)

        def make(threads: int, images: Tensor) -> Callable[[], None]:
            assert threads == torch.get_num_threads()
            assert images.shape[1:] == SIZE
            return lambda: run(len(images))

        return lambda networks: Backend(make=make, size_bytes=1024 * len(name), note=f"fake {name}")


def measured(clock: Clock, backends: dict[str, Any], **options: Any) -> BenchReport:
    names = {"reference": next(iter(backends)), "batches": [1], "threads": [1], "rounds": 3} | options
    return bench_(NET, NET, SIZE, backends=backends, clock=clock, turn_seconds=0.0, **names)


def rows(report: BenchReport) -> list[str]:
    """The lines of a report, one space between words."""
    return [" ".join(line.split()) for line in str(report).splitlines()]


def fail(*args: Any, error: type[BaseException], words: str = "words\nand more") -> Any:
    raise error(words)


def test_backends_take_turns_and_each_round_starts_with_another() -> None:
    clock = Clock()
    measured(clock, {name: clock.backend(name, 1.0) for name in "abc"})
    names = "".join(name for name, *_ in clock.calls)
    assert names == "a" * WARMING + "b" * WARMING + "c" * WARMING + "abc" + "bca" + "cab"


def test_each_number_of_threads_and_images_is_measured_with_that_many() -> None:
    clock, before = Clock(), torch.get_num_threads()
    report = measured(clock, {"a": clock.backend("a", 1.0)}, threads=[2, 1, 2], batches=[4, 1])
    cases = [(x.threads, x.batch) for x in report.latencies]
    assert cases == [(1, 4), (1, 1), (2, 4), (2, 1)]
    assert list(dict.fromkeys((threads, batch) for _, threads, batch in clock.calls)) == cases
    assert torch.get_num_threads() == before


def test_without_threads_one_and_all_cores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_cores", lambda: 3)
    clock = Clock()
    report = measured(clock, {"a": clock.backend("a", 1.0)}, threads=None)
    assert [x.threads for x in report.latencies] == [1, 3]


@pytest.mark.parametrize("where", [0, WARMING])
def test_threads_are_put_back_after_an_interruption(where: int) -> None:
    clock, before = Clock(), torch.get_num_threads()

    def make(threads: int, images: Tensor) -> Callable[[], object]:
        calls = itertools.count()
        return lambda: fail(error=KeyboardInterrupt) if next(calls) == where else None

    with pytest.raises(KeyboardInterrupt):
        measured(clock, {"a": lambda _: Backend(make=make, size_bytes=1, note="")}, threads=[before + 1])
    assert torch.get_num_threads() == before


def test_medians_quartiles_and_speedups_follow_from_the_times() -> None:
    clock = Clock()
    warm = [9.0] * WARMING
    backends = {
        "base": clock.backend("base", *warm, 0.2, 0.4, 0.3),
        "backend": clock.backend("backend", *warm, 0.1, 0.1, 0.3),
    }
    base, backend = measured(clock, backends, batches=[8]).latencies
    assert base.milliseconds == pytest.approx((200, 400, 300))
    assert (base.median_milliseconds, *base.quartiles_milliseconds) == pytest.approx((300, 250, 350))
    assert base.images_per_second == pytest.approx(8 / 0.3)
    assert base.speedups == (1, 1, 1)
    # Of a round each: the quotient of the medians would be 3.
    assert backend.speedups == pytest.approx((2, 4, 1))
    assert backend.median_speedup == pytest.approx(2)
    assert backend.quartiles_speedup == pytest.approx((1.5, 3))


@pytest.mark.parametrize(
    ("durations", "seconds", "calls", "expected"),
    [([0.3, 0.1, 0.1], 0.5, 3, 0.1), ([9.0], 0.5, 1, 9.0), ([0.25, 0.5], 0.75, 2, 0.375), ([1.0], 0.0, 1, 1.0)],
)
def test_a_turn_is_the_median_of_the_calls_that_fit(
    durations: list[float], seconds: float, calls: int, expected: float
) -> None:
    clock = Clock()
    run = clock.backend("a", *durations)(None).make(torch.get_num_threads(), torch.zeros(1, *SIZE))  # type: ignore[arg-type]
    assert measure._turn(run, seconds, clock) == pytest.approx(expected)
    assert len(clock.calls) == calls


def test_the_report_names_every_backend_with_time_size_and_note() -> None:
    clock = Clock()
    backends = {"quick": clock.backend("quick", 0.001), "slow one": clock.backend("slow one", 0.002)}
    report = measured(clock, backends, batches=[1, 32], name="<resnet18>")
    assert report._repr_html_().startswith("<p>&lt;resnet18&gt;, scheme none, images of 3 x 2 x 2</p><table>")
    lines = rows(report)
    assert lines[0] == "<resnet18>, scheme none, images of 3 x 2 x 2"
    assert lines[2].endswith("speed-up over quick in the same round")
    assert "1 1 quick 1.00 1.00\N{EN DASH}1.00 1,000 1.00 1.00\N{EN DASH}1.00" in lines
    assert "1 32 slow one 2.00 2.00\N{EN DASH}2.00 16,000 0.500 0.500\N{EN DASH}0.500" in lines
    assert {"quick 5.0 1.00", "slow one 8.0 0.625"} <= set(lines)  # KiB, times smaller
    assert "slow one fake slow one" in lines
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[-1]
    assert "threads 1, " in lines[-1]


def test_the_report_fits_a_terminal() -> None:
    clock = Clock()
    report = measured(clock, {name: clock.backend(name, 123.4) for name in BACKENDS}, batches=[1, 32], threads=[1, 16])
    once = Startup(backend="a", batch=1, threads=2, seconds=(9,))
    console = Console(file=io.StringIO(), width=80)
    console.print(dataclasses.replace(report, startups=(once,)))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert sum(line.count("123,400") > 0 for line in lines) == 4 * len(BACKENDS)


def test_the_data_are_json_with_every_round() -> None:
    clock = Clock()
    report = measured(clock, {"a": clock.backend("a", 0.001)}, rounds=5)
    found = json.loads(json.dumps(report.to_json()))
    assert found["latencies"][0]["milliseconds"] == pytest.approx([1.0] * 5)
    assert found["latencies"][0]["median_milliseconds"] == pytest.approx(1.0)
    assert found["size_bytes"] == {"a": 1024}
    assert {"processor", "cores", "load average before", "torch", "commit"} <= set(found["environment"])


def test_a_backend_that_cannot_be_is_left_out_with_the_reason() -> None:
    clock = Clock()
    broken = Backend(make=functools.partial(fail, error=RuntimeError), size_bytes=1, note="")
    backends = {
        "base": functools.partial(fail, error=BackendMissing, words="needs what: pip install 'bonn-qat[bench]'"),
        "exporter": functools.partial(fail, error=ValueError),
        "runtime": lambda networks: broken,
        "a": clock.backend("a", 1.0),
        "b": clock.backend("b", 2.0),
    }
    report = measured(clock, backends)
    assert [(x.backend, x.median_speedup) for x in report.latencies] == [("a", None), ("b", None)]
    assert report.missing == {"base": "needs what: pip install 'bonn-qat[bench]'"}
    assert report.failures == {"exporter": "ValueError: words", "runtime": "RuntimeError: words"}
    assert "base not measured: needs what: pip install 'bonn-qat[bench]'" in rows(report)
    del backends["runtime"]
    report = measured(clock, backends)
    assert report.reference == "a"
    assert [x.median_speedup for x in report.latencies] == [1.0, 0.5]


def test_a_report_without_any_backend_says_why() -> None:
    report = measured(Clock(), {"a": functools.partial(fail, error=BackendMissing, words="needs a")})
    assert "a not measured: needs a" in rows(report)
    assert report.chart() is None


@pytest.mark.parametrize("name", [name for name in BACKENDS if name.startswith("onnxruntime")])
def test_without_onnxruntime_its_backends_name_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    networks = Networks(float_model=NET, binary_model=NET, size=SIZE, directory=tmp_path)
    with pytest.raises(BackendMissing, match=r"^needs onnxruntime: pip install 'bonn-qat\[bench\]'$"):
        BACKENDS[name](networks)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"batches": []}, {"batches": [1, 0]}, {"threads": [0]}])
def test_numbers_below_one_are_refused(wrong: dict[str, Any]) -> None:
    clock = Clock()
    with pytest.raises(InvalidBenchmark, match=f"^{next(iter(wrong))} of a benchmark are"):
        measured(clock, {"a": clock.backend("a", 1.0)}, **wrong)
    assert not clock.calls


def test_a_reference_that_is_no_backend_is_refused() -> None:
    with pytest.raises(UnknownName, match="unknown backend 'torch flaot'; did you mean 'torch float'"):
        bench_(NET, NET, SIZE, reference="torch flaot")


@pytest.fixture(scope="module")
def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network: nn.Module = timm.create_model("wrn10_16", num_classes=10)
    return network, bonn_qat.binarize(network, input_size=(3, 32, 32))


@pytest.fixture(scope="module")
def made(networks: tuple[nn.Module, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backend]:
    """The backends of a WRN-10, each with its file."""
    pytest.importorskip("onnxruntime")
    float_model, binary_model = (model.eval() for model in networks)
    folder = tmp_path_factory.mktemp("backends")
    given = Networks(float_model=float_model, binary_model=binary_model, size=(3, 32, 32), directory=folder)
    return {name: make(given) for name, make in BACKENDS.items()}


def test_every_backend_computes_its_network(made: dict[str, Backend], networks: tuple[nn.Module, nn.Module]) -> None:
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        plain, binary = (model.eval()(images) for model in networks)
    found = {name: backend.make(1, images)() for name, backend in made.items()}
    torch.testing.assert_close(found["torch float"], plain)
    torch.testing.assert_close(found["torch binary"], binary)
    torch.testing.assert_close(found["packed"], binary, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(found["onnxruntime float"][0]), plain, rtol=1e-3, atol=1e-4)
    rounded = torch.from_numpy(found["onnxruntime int8"][0])  # far apart are only unrelated networks
    assert torch.corrcoef(torch.stack([rounded.flatten(), plain.flatten()]))[0, 1] > 0.9


def test_sizes_are_those_of_the_weights(made: dict[str, Backend], networks: tuple[nn.Module, nn.Module]) -> None:
    floats = sum(x.numel() * x.element_size() for x in networks[0].state_dict().values())
    assert floats < made["torch float"].size_bytes < 1.05 * floats
    assert 0.95 * floats < made["onnxruntime float"].size_bytes < 1.05 * floats
    assert made["onnxruntime int8"].size_bytes < 0.4 * floats
    assert made["torch binary"].size_bytes < 0.4 * floats


def test_a_round_of_all_backends(made: dict[str, Backend], networks: tuple[nn.Module, nn.Module]) -> None:
    ready = {name: functools.partial(lambda backend, _: backend, backend) for name, backend in made.items()}
    report = bench_(*networks, (3, 32, 32), backends=ready, batches=[1, 2], threads=[1], rounds=1, turn_seconds=0.0)
    assert [x.backend for x in report.latencies] == [*BACKENDS, *BACKENDS]
    assert (report.scheme, report.reference, report.failures) == ("bonn", "onnxruntime float", {})
    assert all(x.median_milliseconds > 0 for x in report.latencies)


def test_the_models_stay_as_they_are(networks: tuple[nn.Module, nn.Module]) -> None:
    for model in networks:
        model.train()
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in networks]
    backends = {name: BACKENDS[name] for name in ("torch float", "torch binary")}
    report = bench_(*networks, (3, 32, 32), backends=backends, reference="torch float", batches=[2], threads=[1],
                    rounds=1, turn_seconds=0.0)  # fmt: skip
    assert [x.backend for x in report.latencies] == list(backends)
    for model, values in zip(networks, before, strict=True):
        assert all(module.training for module in model.modules())
        for key, value in model.state_dict().items():
            assert torch.equal(value, values[key])
            assert value.stride() == values[key].stride()


@pytest.mark.parametrize("name", ["torch float", "torch binary", "packed"])
def test_a_process_says_when_its_first_result_is_there(
    name: str, made: dict[str, Backend], capsys: pytest.CaptureFixture[str]
) -> None:
    launch = made[name].launch
    assert launch is not None
    how = launch()
    assert any(module.startswith("bonn_qat.") for module in how.modules) or name == "packed"
    engines.main([how.engine, str(how.path), str(torch.get_num_threads()), "1,3,32,32", *how.modules])
    first, memory = capsys.readouterr().out.splitlines()
    assert first == engines.FIRST_RESULT
    assert set(json.loads(memory)) == {"process_kib", "added_kib"}


def test_startup_times_processes_that_import_no_more_than_they_need(made: dict[str, Backend], tmp_path: Path) -> None:
    broken = dataclasses.replace(
        made["onnxruntime float"], launch=lambda: Launch(engine="onnxruntime", path=tmp_path / "none.onnx")
    )
    unsaved = dataclasses.replace(made["torch float"], launch=functools.partial(fail, error=AttributeError))
    without = dataclasses.replace(made["torch float"], launch=None)
    backends = {"works": made["onnxruntime float"], "broken": broken, "unsaved": unsaved, "without": without}
    (found,), failures = start(backends, (3, 32, 32), rounds=1, batch=2)
    assert (found.backend, found.batch, found.threads) == ("works", 2, 1)
    assert min(found.seconds) > 0
    assert failures["unsaved"] == "AttributeError: words"
    assert failures["broken"].startswith("DidNotStart: ")
    assert "none.onnx" in failures["broken"]
    if Path("/proc/self/clear_refs").exists():
        (process,), (added,) = found.process_kib, found.added_kib
        assert made["onnxruntime float"].size_bytes / 2**10 < added < process < 300 * 2**10  # torch alone takes as much


def test_startups_stand_in_the_report() -> None:
    clock = Clock()
    once = Startup(backend="a", batch=1, threads=2, seconds=(1, 2, 3), added_kib=(2048,))
    lines = rows(dataclasses.replace(measured(clock, {"a": clock.backend("a", 1.0)}), startups=(once,)))
    assert any("batch 1, 2 threads, medians of 3 rounds" in line for line in lines)
    assert "a 2.00 unknown 2.0" in lines


def test_the_chart_has_a_panel_for_each_case_and_a_bar_for_each_backend() -> None:
    clock = Clock()
    backends = {"$a$": clock.backend("a", 0.001), "packed": clock.backend("packed", 0.0005)}
    svg = measured(clock, backends, batches=[1, 32], threads=[1, 2]).chart()
    assert svg is not None
    root = ElementTree.fromstring(svg)
    texts = ["".join(x.itertext()) for x in root.iter() if x.tag.endswith("}text")]
    assert root.attrib["aria-label"] == "Latency of one call"
    for batch, threads in itertools.product((1, 32), ("1 thread", "2 threads")):
        assert f"batch {batch}, {threads}" in texts
    assert texts.count("$a$") == 2  # beside each row of panels
    assert texts.count("1.00 (1.00x)") == texts.count("0.500 (2.00x)") == 4
    assert plotting.HERO_COLOUR.lower() in svg.lower()


@pytest.mark.parametrize(
    ("value", "text"), [(0.00031, "0.000310"), (9.999, "10.0"), (99.96, "100"), (12345.6, "12,346")]
)
def test_digits_are_three_and_never_an_exponent(value: float, text: str) -> None:
    assert plotting.digits(value) == text


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not tell")
def test_the_processor_is_named_with_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\n"
    monkeypatch.setattr(Path, "read_text", lambda self: said)
    assert environment.processor() == "Some CPU (avx2 avx512_vnni)"


def test_the_command_prints_the_tables_and_writes_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    clock = Clock()

    def stand_in(network: nn.Module, binary: nn.Module, size: tuple[int, ...], **options: Any) -> BenchReport:
        asked.append(options | {"size": size})
        assert binary.binarization.scheme.name == "xnor"  # type: ignore[union-attr]
        return measured(clock, {"a": clock.backend("a", 0.001)}, name=options["name"])

    monkeypatch.setattr("bonn_qat.bench.bench", stand_in)
    sizes = ["--img-size", "32", "--num-classes", "10", "--batch-sizes", "1, 4", "--rounds", "2"]
    command = ["bench", "wrn10_16", "--scheme", "xnor", *sizes]
    assert cli.main([*command, "--threads", "1,2", "--startup", "--output", str(tmp_path)]) == 0
    assert (asked[0]["batches"], asked[0]["threads"], asked[0]["startup_rounds"]) == ([1, 4], [1, 2], 3)
    assert asked[0]["size"] == (3, 32, 32)
    assert "wrn10_16, scheme none" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["size_bytes"] == {"a": 1024}
    assert (tmp_path / "bench.svg").read_text().startswith("<svg")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main([*command, "--output", str(tmp_path / "other")]) == 0
    assert (asked[1]["threads"], asked[1]["startup_rounds"]) == (None, 0)
    assert "figures need matplotlib" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wrn10_61"], "unknown model 'wrn10_61'; did you mean 'wrn10_16'"),
        (["wrn10_16", "--scheme", "bon"], "unknown scheme 'bon'; did you mean 'bonn'"),
        (["wrn10_16", "--threads", "1,all"], "'1,all' is not a list of whole numbers; write --threads 1,4"),
        (["wrn10_16", "--img-size", "32", "--batch-sizes", "0"], "batches of a benchmark are [0]"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_backend_that_fails_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backends = {"a": functools.partial(fail, error=ValueError)}
    monkeypatch.setattr("bonn_qat.bench.bench", lambda *args, **options: measured(Clock(), backends))
    assert cli.main(["bench", "wrn10_16", "--img-size", "32"]) == 1
    assert "a failed: ValueError: words" in " ".join(capsys.readouterr().out.split())
