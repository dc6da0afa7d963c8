"""Shards of a run: whatever their number and order, the merged run writes the bytes of a plain one."""

import json
import random
import re

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.curves import large
from rdoq_onnx.curves.shards import Shards, blocks_of
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.gradients import batch_sizes
from rdoq_onnx.pipeline import Job
from rdoq_onnx.system.curve_files import CurveFiles
from rdoq_onnx.system.progress import Progress

CONVOLUTIONS = """<ir_version: 8, opset_import: ["": 17]> g (float[N,3,8,8] x) => (float[N,5,2] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Relu (a) c = Conv <pads = [1, 1, 1, 1]> (b, v) d = Relu (c)
    r = Reshape (d, shape) y = MatMul (u, r) }"""
# One output for exact sums of unit vectors, tables, and samples of two shapes.
TEXTS = """<ir_version: 8, opset_import: ["": 17]> g (int64[N,T] x) => (float[N,T,20] y) {
    e = Gather (table, x) a = MatMul (e, q) b = Tanh (a) c = MatMul (b, k) d = Add (c, e) y = MatMul (d, h) }"""


def initializers(**shapes):
    rng = np.random.default_rng(0)
    return [numpy_helper.from_array(0.4 * rng.standard_normal(s, np.float32), n) for n, s in shapes.items()]


def small_or_large(kind, monkeypatch):
    """Return a model, its samples and bits, so that it has many blocks and is measured as a small or large network."""
    monkeypatch.setattr(batch_sizes, "_WORTH_SHARING", 0)
    rng = np.random.default_rng(1)
    if kind == "small":
        model = parser.parse_model(CONVOLUTIONS)
        model.graph.initializer.extend(initializers(w=(6, 3, 3, 3), v=(8, 6, 3, 3), u=(5, 256)))
        model.graph.initializer.append(numpy_helper.from_array(np.array([0, 256, 2]), "shape"))
        samples, bits = {"x": rng.standard_normal((40, 3, 8, 8), np.float32)}, {"weight_bits": 4, "activation_bits": 8}
    else:
        monkeypatch.setattr(large, "LARGE", 0)
        model = parser.parse_model(TEXTS)
        model.graph.initializer.extend(initializers(table=(100, 12), q=(12, 16), k=(16, 12), h=(12, 20)))
        samples = [{"x": rng.integers(0, 30, (1, 5 + k % 2))} for k in range(40)]
        bits = {"weight_bits": 3, "activation_bits": None}
    return model, samples, bits


@pytest.fixture(params=["small", "large"])
def run(request, tmp_path, monkeypatch):
    """Return a function that runs as a shard, or to the end."""
    model, samples, bits = small_or_large(request.param, monkeypatch)

    def run(curves=None, shard=None, **settings):
        config = Config(**{**bits, "threads": 1, "effort": "fast", **settings})
        files = CurveFiles.of(None if curves is None else tmp_path / curves, shard)
        if shard is None:
            return pipeline.run(model, samples, config, Progress(), files).model.SerializeToString()
        return Job.of(model, samples, config, Progress(), files).sum_shard(config)

    run.folder, run.kind = tmp_path, request.param
    return run


@pytest.mark.parametrize(("count", "rounds"), [(1, 1), (2, 1), (3, 3), (8, 2)])
def test_any_number_of_shards_in_any_order_gives_the_same_bytes(run, count, rounds):
    expected = run()
    for _ in range(rounds):
        order = random.Random(count).sample(range(1, count + 1), count)
        for k in order:
            run("part*.npz" if rounds > 1 else f"part{k}.npz", (k, count))
    before = {path: path.read_bytes() for path in run.folder.glob("part*.npz")}
    assert len(before) == count
    assert run("part*.npz") == expected
    assert {path: path.read_bytes() for path in run.folder.glob("part*.npz")} == before


@pytest.mark.parametrize("run", ["small"], indirect=True)
def test_shards_sum_copies_of_images_too(run, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.reconstruction.work.MOST", 0)
    expected = run(effort="best")
    for _ in range(4):
        for k in (1, 2):
            run("part*.npz", (k, 2), effort="best")
    summed = [name for name in json.loads(header(run.folder / "part1.npz"))["values"] if "moments of Conv_0" in name]
    assert [name.split(" on ")[1] for name in summed] == ["23 samples", "115 samples", "11 samples"]
    assert run("part*.npz", effort="best") == expected


@pytest.mark.parametrize("count", [1, 3])
def test_large_sums_are_in_files_beside_those_of_the_shards(run, count, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.curves.part_arrays.PARKED", 0)
    monkeypatch.setattr("rdoq_onnx.curves.part_arrays.LEAST_PARKED", 0)
    expected = run()
    for _ in range(3):
        for k in range(1, count + 1):
            run("part*.npz", (k, count))
    folder = run.folder / "part1.npz.data"
    named = {e.removesuffix('"') for e in re.findall(r'sum-\w+"', header(run.folder / "part1.npz"))}
    assert named == {path.stem for path in folder.glob("sum-*")}
    assert len(named) > 10
    assert run("part*.npz") == expected
    next(folder.glob("sum-*")).unlink()
    with pytest.raises(ConfigError, match=r"part1.npz: its folder .*part1.npz.data is incomplete; delete both"):
        run("part*.npz")


def header(path):
    """Return the values of a file as JSON."""
    return np.load(path)["header"].tobytes().decode()


def names(path):
    """Return the kinds of sums in a file."""
    values = json.loads(header(path))["values"]
    return {k.split("/", 2)[2].split(" of ")[0] for k in values if k.startswith("sums/")}


def test_each_round_sums_what_the_last_one_made_possible(run):
    found = []
    for _ in range(4):
        for k in (2, 1):
            run("part*.npz", (k, 2))
        found.append(names(run.folder / "part2.npz"))
    first = {"small": {"moments"}, "large": {"moments", "tables"}}[run.kind]
    rest = {"small": {"sensitivity", "taylor", "taylor, activations"}, "large": {"sensitivity", "forms"}}[run.kind]
    assert found[0] == first
    assert found[1] > first
    assert found[2:] == [first | rest] * 2


def test_the_merging_run_only_computes_what_no_part_has(run, monkeypatch):
    for _ in range(4):
        for k in (1, 2):
            run("part*.npz", (k, 2))
    expected, asked = run(), []
    compute = Shards.__init__

    def watched(self, *args):
        compute(self, *args)
        own = self.compute
        self.compute = lambda sum_, indices: (asked.append((sum_.name, *indices)), own(sum_, indices))[1]

    monkeypatch.setattr(Shards, "__init__", watched)
    assert run("part*.npz") == expected
    assert not [name for name, *indices in asked if indices and name != "layers"]


@pytest.mark.parametrize("parked", [0, 1 << 26])
def test_a_killed_shard_goes_on_with_its_own_blocks(run, parked, monkeypatch):
    monkeypatch.setattr("rdoq_onnx.curves.part_arrays.PARKED", parked)
    expected, total = run(), Shards.total
    run("part2.npz", (2, 2))

    class Killed(BaseException):
        pass

    def interrupted(self, asked, advance, unfinished):
        own = self.compute

        def compute(asked, indices):
            yield next(own(asked, indices))
            raise Killed

        self.compute = compute
        return total(self, asked, advance, unfinished)

    monkeypatch.setattr(Shards, "total", interrupted)
    with pytest.raises(Killed):
        run("part1.npz", (1, 2))
    monkeypatch.setattr(Shards, "total", total)
    run("part1.npz", (1, 2))
    assert run("part*.npz") == expected


def test_shards_that_do_not_fit_together_are_refused_by_name(run):
    for k in (1, 2):
        run(f"part{k}.npz", (k, 3))

    def refused(message, curves="part*.npz", shard=None, **settings):
        with pytest.raises(ConfigError, match=message):
            run(curves, shard, **settings)

    refused("the file of shard 3/3 is missing; run it")
    refused("part1.npz: is of shard 1/3 alone; give a pattern", "part1.npz")
    refused("part1.npz: is of shard 1/3; give each shard a file of its own", "part1.npz", (2, 3))
    refused(r"part1.npz: is shard 1/3, and .*part4.npz is 4/4; give those of one N", shard=(4, 4))
    (run.folder / "part4.npz").unlink()
    run("part3.npz", (3, 3))
    refused("part1.npz: was measured with --seed 0, not 5", seed=5)
    refused("part1.npz: was measured on other samples", samples=39)
    other = {"small": {"activation_bits": None}, "large": {"weight_bits": 3, "activation_bits": 8}}[run.kind]
    refused("part1.npz: was (summed for budgets of another kind|measured on another model)", **other)
    copied = run.folder / "part7.npz"
    copied.write_bytes((run.folder / "part2.npz").read_bytes())
    refused("part7.npz: is shard 2/3, as .*part2.npz is")
    copied.unlink()
    run("whole.npz")
    refused("whole.npz: holds a measurement, not a shard's sums", "whole.npz", (1, 3))
    (run.folder / "whole.npz").rename(copied)
    refused("part7.npz: is not of a shard")


def test_every_block_is_of_one_shard():
    for count in range(40):
        for shards in range(1, 50):
            found = [k for n in range(1, shards + 1) for k in blocks_of((n, shards), count)]
            assert found == list(range(count))
