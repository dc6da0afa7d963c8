"""Exact measurement: the gain from keeping tensors of the float network, and the cost of a perturbation.

    python tests/benchmarks/bench_probe.py [--only TABLE] [--model MODEL] [--samples N]

Tables: alone (each layer and activation at one width, as for --report), anchors (four widths of each layer, eight of
each activation). README.md describes the columns.
"""

import statistics
from dataclasses import replace

from bench_speed import RUNTIME, Subject, subjects, timed
from tables import parser, write
from turns import in_turns

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.candidates.activations import affine
from rdoq_onnx.candidates.candidates import integer_limit
from rdoq_onnx.candidates.quantizer import quantize_rows
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import aimed_at
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.probing.probe import Prober

TABLES = {"alone": ((4,), (8,)), "anchors": ((0, 1, 2, 3), tuple(range(1, 9)))}
COLUMNS = (-15, -6, 8, 10, 10, 7, 10)


def measured(subject: Subject, table: str, count: int, rounds: int) -> tuple[str, ...]:
    """Measure a row of `table`."""
    normal, samples = subject.loaded(count)
    parts = find_parts(normal)
    network = aimed_at(analyse(normal, Config().selection), measured_tensors(parts))
    observation = observe(network, parts, samples, RUNTIME)
    widths, precisions = TABLES[table]
    limit = integer_limit(network)
    codes = [[quantize_rows(network.rows(x), b, limit) for b in widths] for x in network.layers]
    quantizers = [[affine(*observation.ranges[a.tensor], b) for b in precisions] for a in network.activations]
    prober = Prober(network, samples, observation.metric, RUNTIME, observation.batching)

    def curves(memory: int) -> None:
        judge = replace(prober, memory=memory)  # has kept nothing yet
        for layer, several in zip(network.layers, codes, strict=True):
            judge.whole_layer(layer, several)
        for activation, table in zip(network.activations, quantizers, strict=True):
            judge.activation(activation, table)

    turns = in_turns(lambda: curves(prober.memory), lambda: curves(0), rounds)
    session = RUNTIME.session(network.model, "all")
    feeds = list(samples.batches(observation.batching.size))
    once = statistics.median(timed(lambda: [session.run(f) for f in feeds]) for _ in range(5))
    runs = sum(map(len, codes)) + sum(map(len, quantizers))
    return (
        subject.name,
        table,
        str(runs),
        f"{turns.first:.2f} s",
        f"{turns.second:.2f} s",
        f"{1 / turns.ratio:.2f}",
        f"{turns.first / once / runs:.2f}",
    )


def main() -> None:
    """Print the selected tables, model by model."""
    models = subjects()
    arguments = parser(__doc__, TABLES, models)
    arguments.add_argument("--samples", type=int, default=16, metavar="N", help="calibration samples (16)")
    arguments.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each (3)")
    args = arguments.parse_args()
    write(("model", "what", "Δ", "kept", "not kept", "ratio", "passes"), COLUMNS)
    for name in args.model or models:
        for table in args.only or TABLES:
            write(measured(models[name], table, args.samples, args.rounds), COLUMNS)


if __name__ == "__main__":
    main()
