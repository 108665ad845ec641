"""Measures gptk on a GPU beside transformers on the same one, and writes docs/benchmarks/gpu.md.

    python benchmarks/on_gpu.py [--write FILE] [--seconds 230]

Each part is skipped if the seconds are up, and what fails says so in the page; the exit status is 1
then. Shares are those of what this card was measured to do in the same run: to copy memory, and to
multiply matrices. Without a CUDA device nothing is measured or written, with the reason, and the
exit status is 0. --try runs all parts with tiny models on the CPU, to test the script itself.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

import gptk
import machine
import models
from engines import Transformers, forget, transformers_smollm2
from machine import Work
from table import Result, write_section
from training_steps import our_step
from turns import in_turns


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    device: str = "cuda"
    rows: tuple[int, ...] = (1, 16, 64)
    new: int = 128
    prompt: int = 16
    long_prompt: int = 512
    beams: int = 4
    rounds: int = 3
    batch: int = 16
    length: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"


TINY = Sizes("cpu", (1, 3), 6, 5, 12, 2, 1, 2, 16, 2, 2, 32)


@dataclass
class Page:
    """What came out."""

    sizes: Sizes
    rows: list[tuple[str, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, what: str, ours: float, theirs: float | None, work: Work) -> None:
        """ours, theirs: seconds of gptk, and of its peer. work: the least that gptk must do."""
        limit, bound = work.limit(machine.limits(self.sizes.device))
        speed = Result(what, ours, work.tokens / ours, limit / ours, bound).cells()
        peer = "" if theirs is None else f"{work.tokens / theirs:,.1f}"
        ratio = "" if theirs is None else f"{theirs / ours:.2f}"
        self.rows.append((what, speed[2], peer, ratio, speed[3]))
        print(*self.rows[-1], sep=" | ", flush=True)

    def markdown(self) -> str:
        head = ("work", "gptk, tokens/s", "transformers", "ratio", "of the card's limit")
        lines = [head, ("---",) * len(head), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        device = self.sizes.device
        name = torch.cuda.get_device_name() if device == "cuda" else "a CPU, for a try"
        about = f"{name}: {machine.limits(device)}; torch {torch.__version__}, gptk "
        failures = "".join(f"\n- {failure}" for failure in self.failures)
        return f"{about}{gptk.__version__}, {_transformers_version()}.\n\n{table}\n{failures}"


Part = Callable[[], None]


def parts(page: Page) -> Iterator[tuple[str, Part]]:
    """All that is measured, the most important first."""
    sizes = page.sizes
    for rows in sizes.rows:
        yield f"decoding, {rows} rows", functools.partial(_decoding, page, rows)
    yield f"{sizes.beams} beams", functools.partial(_decoding, page, 1, sizes.beams)
    yield "prompt", functools.partial(_prompt, page)
    yield "training", functools.partial(_training, page)
    yield "int4", functools.partial(_decoding, page, 1, quantize="int4")
    yield "int8", functools.partial(_decoding, page, 1, quantize="int8")


def measure(page: Page, seconds: float) -> None:
    start = time.perf_counter()
    for name, part in parts(page):
        if time.perf_counter() - start > seconds:
            page.failures.append(f"{name}: not measured, the time was up")
            continue
        try:
            part()
        except gptk.DeviceError as error:  # torchao is not installed, or the card is too old
            page.rows.append((f"{name}: {error}", "", "", "", ""))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            page.failures.append(f"{name}: {type(error).__name__}: {reason}")
            print(page.failures[-1], file=sys.stderr, flush=True)


def _decoding(page: Page, rows: int, beams: int = 1, quantize: str = "none") -> None:
    """Greedy decoding of prompts of the same length, or beams of one; the prompt is counted."""
    sizes = page.sizes
    lm = _ours(sizes, quantize)
    prompts = _prompts(lm, rows, sizes.prompt)
    sampler = "greedy" if beams == 1 else f"beam:width={beams}"
    settings = {"sampler": sampler, "max_new_tokens": sizes.new, "ignore_eos": True}
    keywords = {"num_beams": beams} if beams > 1 else {}

    def ours() -> None:
        forget(lm)
        lm.generate_batch(prompts, **settings)

    def theirs() -> None:
        _theirs(sizes).generate(_ids(sizes, prompts), sizes.new, **keywords)

    functions = {"gptk": ours} | ({"transformers": theirs} if quantize == "none" else {})
    seconds = in_turns(_synchronized(functions, sizes), sizes.rounds)
    step = models.pass_work(
        lm.model, rows * beams, 1, sizes.prompt + sizes.new // 2, dtype=sizes.dtype
    )
    work = Work(rows * sizes.new, sizes.new * step.bytes, sizes.new * step.operations, step.dtype)
    what = f"{beams} beams" if beams > 1 else f"{rows} rows" if rows > 1 else "one row"
    kind = "" if quantize == "none" else f", {quantize}"
    page.add(f"{what}, greedy{kind}" if beams == 1 else what, *_pair(seconds), work)


def _prompt(page: Page) -> None:
    """Reading a prompt, and one new token."""
    sizes = page.sizes
    lm = _ours(sizes)
    prompts = _prompts(lm, 1, sizes.long_prompt)

    def ours() -> None:
        forget(lm)
        lm.generate(prompts[0], max_new_tokens=1, ignore_eos=True)

    def theirs() -> None:
        _theirs(sizes).generate(_ids(sizes, prompts), 1)

    functions = {"gptk": ours, "transformers": theirs}
    seconds = in_turns(_synchronized(functions, sizes), 3 * sizes.rounds)
    work = models.pass_work(lm.model, 1, sizes.long_prompt, dtype=sizes.dtype)
    page.add(f"a prompt of {sizes.long_prompt}", *_pair(seconds), work)


def _training(page: Page) -> None:
    """A step of GPT-2 124M with fused AdamW under autocast, beside transformers' model."""
    sizes = page.sizes
    settings = {"n_layers": sizes.layers, "n_heads": sizes.heads, "width": sizes.width}
    settings |= {"qkv_bias": True, "tied_head": True, "device": sizes.device, "dtype": sizes.dtype}
    trainer = our_step(sizes.batch, sizes.length, **settings)
    functions = {"gptk": trainer.step, "transformers": _their_step(sizes)}
    seconds = in_turns(_synchronized(functions, sizes), sizes.rounds)
    work = models.training_work(trainer.model, sizes.batch, sizes.length, sizes.dtype)
    what = f"training step, GPT-2 124M, {sizes.batch} by {sizes.length}"
    page.add(what, *_pair(seconds), work)


def _their_step(sizes: Sizes) -> Callable[[], None]:
    import transformers

    config = transformers.GPT2Config(
        n_positions=sizes.length,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        n_embd=sizes.width,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config).train().to(sizes.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, fused=True)
    ids = torch.randint(0, models.GPT2_VOCABULARY, (sizes.batch, sizes.length + 1))

    def step() -> None:
        batch = ids.to(sizes.device)
        enabled = sizes.dtype == "bfloat16"
        with torch.autocast(sizes.device, torch.bfloat16, enabled=enabled):
            logits = model(batch[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch[:, 1:].flatten()
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@functools.cache
def _ours(sizes: Sizes, quantize: str = "none") -> gptk.LanguageModel:
    """SmolLM2 from its GGUF file, or for a try a tiny model."""
    source = "smollm2" if sizes.device == "cuda" else str(_tiny())
    return gptk.load(source, device=sizes.device, dtype=sizes.dtype, quantize=quantize)


@functools.cache
def _theirs(sizes: Sizes) -> Transformers:
    if sizes.device == "cuda":
        return Transformers(transformers_smollm2("bfloat16").model.to("cuda"))
    import transformers

    return Transformers(transformers.AutoModelForCausalLM.from_pretrained(_tiny()))


@functools.cache
def _tiny() -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    folder = Path(_folder.name) / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


_folder = tempfile.TemporaryDirectory(prefix="gptk-on-gpu-")


def _prompts(lm: gptk.LanguageModel, rows: int, length: int) -> list[list[int]]:
    return [models.prompt(length, row, lm.model.config.vocab_size) for row in range(rows)]


def _ids(sizes: Sizes, prompts: list[list[int]]) -> torch.Tensor:
    return torch.tensor(prompts, device=sizes.device)


def _synchronized(
    functions: dict[str, Callable[[], object]], sizes: Sizes
) -> dict[str, Callable[[], None]]:
    """Functions that return once the GPU has computed all."""

    def run(function: Callable[[], object]) -> None:
        machine.synchronized(function, sizes.device)()  # not its result: a float would be seconds

    return {name: functools.partial(run, function) for name, function in functions.items()}


def _pair(seconds: dict[str, float]) -> tuple[float, float | None]:
    return seconds["gptk"], seconds.get("transformers")


def _transformers_version() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="the page whose section gpu is written")
    parser.add_argument("--seconds", type=float, default=230, help="no part begins after these")
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny models, on the CPU")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        built = "" if torch.version.cuda else f"; torch {torch.__version__} is built without CUDA"
        print(f"skipped: no CUDA device{built}")
        return 0
    page = Page(TINY if options.tiny else Sizes())
    measure(page, options.seconds)
    text = page.markdown()
    print(text)
    if options.write is not None:
        write_section(options.write, "gpu", text)
    return 1 if page.failures else 0


if __name__ == "__main__":
    sys.exit(main())
