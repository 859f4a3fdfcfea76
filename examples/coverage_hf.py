"""What s2o does to unmodified Hugging Face models: tiny random ones, float32, on the CPU.

    python examples/coverage_hf.py                                          # every model, under four minutes
    python examples/coverage_hf.py --models llama --inner inductor --cases padded

Every case runs a model in eager mode, compiled with s2o, and compiled with the same compiler without
s2o, on the same inputs. It prints one row per case: attention sites found and rewritten, what their
masks were read as, the reasons for what was left alone, the largest difference from eager in the
logits and in the gradients (as a share of the largest gradient), and graph breaks beside those
without s2o. The exit status is 1 when a case failed, generated other tokens, or has more graph
breaks or graphs than without s2o.

Mixture-of-experts models train with experts_implementation="batched_mm", see `hf_models.build`.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import hf_models
import torch
import transformers
from torch import Tensor, nn

import s2o_inductor

DROPOUT = "train, default dropout"
Run = Callable[[Callable[..., Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """One way to call a model.

    Attributes:
        name: as printed.
        model: built for this case.
        run: calls a forward (the model's own, or a compiled one in its place) and returns what is
            compared: "logits", "tokens", and gradients under "grad <batch> <parameter>".
        sites: attention calls in one captured forward; None where the number of graphs is not known
            beforehand.
    """

    name: str
    model: nn.Module
    run: Run
    sites: int | None


@dataclass
class Result:
    """A row of the table; see the module's docstring. Errors are absolute, `gradient` relative to the largest."""

    model: str
    attention: str
    case: str
    sites: int = 0
    rewritten: int = 0
    missing: int = 0
    masks: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    logits: float | None = None
    logits_without: float | None = None
    gradient: float | None = None
    gradient_without: float | None = None
    same_tokens: bool | None = None
    graphs: int = 0
    graphs_without: int = 0
    breaks: int = 0
    breaks_without: int = 0
    seconds: float = 0.0
    note: str = ""
    failed: bool = False


def forward(*batches: dict[str, Any]) -> Run:
    """Evaluation without gradients, of one batch after another."""

    def run(call: Callable[..., Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": torch.stack([call(**batch).logits for batch in batches])}

    return run


def backward(model: nn.Module, *batches: dict[str, Any]) -> Run:
    """Forward and backward of training steps; the loss reads every position, padding as well."""

    def run(call: Callable[..., Any]) -> dict[str, Tensor]:
        results, seen = {}, []
        model.train()
        for index, batch in enumerate(batches):
            model.zero_grad(set_to_none=True)
            logits = call(**batch).logits
            targets = hf_models.tokens(*logits.shape[:2], seed=3)
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            seen.append(logits.detach())
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            results |= {f"grad {index} {name}": gradient for name, gradient in gradients.items()}
        model.eval()
        return {"logits": torch.stack(seen), **results}

    return run


def generate(model: nn.Module, kwargs: dict[str, Any], static: bool) -> Run:
    """Greedy generation: a prefill and five steps, with a cache that grows or one of fixed size."""

    def run(call: Callable[..., Any]) -> dict[str, Tensor]:
        model.forward = call  # type: ignore[method-assign]
        try:
            out = model.generate(  # type: ignore[operator]
                **kwargs,
                max_new_tokens=6,
                min_new_tokens=6,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                **({"cache_implementation": "static"} if static else {}),
            )
        finally:
            del model.forward
        return {"tokens": out.sequences, "logits": torch.stack(out.logits)}

    return run


def cases(name: str, attention: str) -> Iterator[Case]:
    """All cases of one model; of its second kind of attention, training alone."""
    architecture = hf_models.ARCHITECTURES[name]
    model = hf_models.build(name, attention)
    trained = hf_models.build(name, attention, experts="batched_mm") if architecture.experts else model
    decoder = architecture.head == "CausalLM"

    def case(title: str, run: Run, on: nn.Module = model, sites: int | None = architecture.sites) -> Case:
        return Case(title, on, run, sites)

    left, right, plain = (hf_models.inputs(name, padding) for padding in ("left", "right", None))
    yield case("train, padded", backward(trained, left, right), trained)
    if attention != architecture.implementations[0]:
        return
    yield case("eval, padded", forward(left, right))
    yield case("eval, no mask", forward(plain))
    if decoder:
        yield case("eval, no mask, no cache", forward(plain | {"use_cache": False}))
    if architecture.packed:
        yield case("train, packed", backward(trained, hf_models.packed_inputs()), trained)
    if architecture.head == "MaskedLM":
        return
    prompt = {key: value for key, value in left.items() if not key.startswith("decoder")}
    yield case("generate, dynamic cache", generate(model, prompt, static=False), sites=None)
    yield case("generate, static cache", generate(model, prompt, static=True), sites=None)


def compiled(case: Case, **how: Any) -> tuple[dict[str, Tensor], int, int]:
    """What a case returns under torch.compile, and its numbers of graphs and graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    values = case.run(torch.compile(case.model.forward, **how))
    counters = torch._dynamo.utils.counters
    return values, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def largest_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float | None]:
    """Largest absolute error of the logits, and of the gradients relative to the largest of them all."""
    if actual.keys() != expected.keys():
        raise AssertionError(f"other gradients than in eager mode: {sorted(actual.keys() ^ expected.keys())}")
    names = [name for name in expected if name.startswith("grad ")]
    logits = (actual["logits"] - expected["logits"]).abs().max().item()
    if not names:
        return logits, None
    scale = max(expected[name].abs().max().item() for name in names)
    return logits, max((actual[name] - expected[name]).abs().max().item() for name in names) / scale


def measure(name: str, attention: str, case: Case, inner: str) -> Result:
    """Runs one case three ways."""
    result, start = Result(name, attention, case.name), time.perf_counter()
    try:
        expected = case.run(case.model.forward)
        without, result.graphs_without, result.breaks_without = compiled(case, backend=inner)
        result.logits_without, result.gradient_without = largest_errors(without, expected)
    except Exception as error:  # not ours: say so, and do not count it against s2o
        result.note = f"not without s2o either: {type(error).__name__}: {str(error).splitlines()[0]}"
        return result
    try:
        actual, result.graphs, result.breaks = compiled(case, backend="s2o", options={"inner": inner})
        result.logits, result.gradient = largest_errors(actual, expected)
    except Exception as error:
        result.note, result.failed = f"{type(error).__name__}: {error}", True
        return result
    sites = [site for site in s2o_inductor.last_report().to_dict()["sites"] if site["kind"] == "attention"]
    rewritten = [site for site in sites if site["status"] == "rewritten"]
    result.sites, result.rewritten = len(sites), len(rewritten)
    result.missing = max(0, (case.sites or 0) * result.graphs_without - len(sites))
    result.masks = dict(Counter(" & ".join(site["mask"]) or "none" for site in rewritten))
    result.reasons = dict(Counter(site["reason"] for site in sites if site["reason"]))
    if "tokens" in expected:
        result.same_tokens = torch.equal(actual["tokens"], expected["tokens"])
    result.failed = bool(
        result.same_tokens is False
        or result.missing
        or result.breaks > result.breaks_without
        or result.graphs > result.graphs_without
    )
    result.seconds = time.perf_counter() - start
    return result


def dropout_statistics(name: str, inner: str, runs: int = 150) -> Result:
    """Trains with the architecture's default dropout; s2o's random masks are its own, so only the statistics agree.

    For every logit, z is the difference of its means over the runs in units of the standard error:
    its root mean square is near 1 where the means agree.
    """
    result, start = Result(name, "sdpa", DROPOUT), time.perf_counter()
    model, kwargs = hf_models.build(name, dropout=True), hf_models.inputs(name, "right")
    case = Case(result.case, model, backward(model, kwargs), hf_models.ARCHITECTURES[name].sites)
    _, result.graphs_without, result.breaks_without = compiled(case, backend=inner)
    actual, result.graphs, result.breaks = compiled(case, backend="s2o", options={"inner": inner})
    if not all(value.isfinite().all() for value in actual.values()):
        result.failed, result.note = True, "a gradient is not finite"
        return result
    sites = s2o_inductor.last_report().to_dict()["sites"]
    result.sites, result.rewritten = len(sites), sum(site["status"] == "rewritten" for site in sites)
    result.masks = dict(Counter(" & ".join(site["mask"]) or "none" for site in sites if site["status"] == "rewritten"))
    result.reasons = dict(Counter(site["reason"] for site in sites if site["reason"]))
    call = torch.compile(model.forward, backend="s2o", options={"inner": inner})
    model.train()
    samples = []
    for one in (model.forward, call):
        torch.manual_seed(7)
        samples.append(torch.stack([one(**kwargs).logits.detach() for _ in range(runs)]).double())
    eager, ours = samples
    error = ((eager.var(0) + ours.var(0)) / runs).sqrt()
    drawn = error > 0  # the logit of a padding token whose embedding is zero never varies
    z = ((eager.mean(0) - ours.mean(0))[drawn] / error[drawn]).square().mean().sqrt().item()
    spread = (ours.var(0).mean() / eager.var(0).mean()).sqrt().item()
    result.note = f"means over {runs} runs: rms z {z:.2f}; standard deviation {spread:.3f} of eager's"
    result.failed = not (z < 1.5 and 0.9 < spread < 1.1)
    result.seconds = time.perf_counter() - start
    return result


HEADER = ("model", "attention", "case", "sites", "rewritten", "masks", "why not", "logits", "gradients", "tokens")
HEADER += ("graphs", "breaks", "s")


def table(results: list[Result]) -> str:
    """The results as a markdown table; "a / b" is with and without s2o."""

    def both(ours: float | None, without: float | None) -> str:
        return "-" if ours is None else f"{ours:.0e} / {without:.0e}"

    def counted(items: dict[str, int]) -> str:
        return "; ".join(f"{text} ({count})" for text, count in items.items()).replace("|", "\\|") or "-"

    rows = [HEADER, ("---",) * len(HEADER)]
    for r in results:
        missing = f" ({r.missing} missing)" if r.missing else ""
        rows.append((
            r.model, r.attention, ("FAILED: " if r.failed else "") + r.case, f"{r.sites}{missing}", str(r.rewritten),
            counted(r.masks), r.note or counted(r.reasons), both(r.logits, r.logits_without),
            both(r.gradient, r.gradient_without), {True: "equal", False: "DIFFER", None: "-"}[r.same_tokens],
            f"{r.graphs} / {r.graphs_without}", f"{r.breaks} / {r.breaks_without}", f"{r.seconds:.0f}",
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(results: list[Result]) -> str:
    """One row per model over all its cases."""
    header = ("model", "cases", "sites", "rewritten", "declined", "masks kept dense", "max logits", "max gradients")
    header += ("generate", "extra breaks")
    rows = [header, ("---",) * len(header)]
    for name in dict.fromkeys(r.model for r in results):
        mine = [r for r in results if r.model == name]
        dense = sum(count for r in mine for mask, count in r.masks.items() if "dense" in mask)
        tokens = [r.same_tokens for r in mine if r.same_tokens is not None]
        rewritten, sites = sum(r.rewritten for r in mine), sum(r.sites for r in mine)
        rows.append((
            name, f"{sum(not r.failed for r in mine)} of {len(mine)} pass", str(sites), str(rewritten),
            str(sites - rewritten), str(dense), f"{max((r.logits or 0.0) for r in mine):.1e}",
            f"{max((r.gradient or 0.0) for r in mine):.1e}",
            f"{sum(tokens)} of {len(tokens)} equal" if tokens else "-",
            str(sum(max(0, r.breaks - r.breaks_without) for r in mine)),
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def titles(name: str) -> Iterator[tuple[str, str]]:
    """(attention, case) of every case of one model."""
    architecture = hf_models.ARCHITECTURES[name]
    for attention in architecture.implementations:
        yield from ((attention, case.name) for case in cases(name, attention))
    if architecture.dropout:
        yield architecture.implementations[0], DROPOUT


def run_task(task: tuple[str, str, str, str]) -> Result:
    """One case, by (model, attention, case, inner): models cannot travel between processes."""
    name, attention, title, inner = task
    if title == DROPOUT:
        return dropout_statistics(name, inner)
    return measure(name, attention, next(case for case in cases(name, attention) if case.name == title), inner)


def quiet() -> None:
    """One thread, and no log of what the table shows, nor of the image processors that need torchvision."""
    torch.set_num_threads(1)
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)
    transformers.logging.set_verbosity(logging.CRITICAL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(hf_models.ARCHITECTURES)
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--inner", default="aot_eager", choices=("aot_eager", "inductor"))
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only the cases whose names hold one of these")
    parser.add_argument("--jobs", type=int, default=2, help="cases to run at a time, on one thread each")
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    arguments = parser.parse_args()
    quiet()
    tasks = [
        (name, attention, title, arguments.inner)
        for name in arguments.models
        for attention, title in titles(name)
        if not arguments.cases or any(text in title for text in arguments.cases)
    ]
    results: list[Result] = []
    # Processes: compiling is Python, and one model's compiled code must not count as another's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, context, initializer=quiet) as pool:
        for result in pool.map(run_task, tasks):
            if results and results[-1].model != result.model:
                print(table([r for r in results if r.model == results[-1].model]), end="\n\n", flush=True)
            results.append(result)
    print(table([r for r in results if r.model == results[-1].model]), end="\n\n")
    print(summary(results))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(r) for r in results], file, indent=1)
    return int(any(r.failed for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
