"""Model files of every format, mutated at the places that their structure is made of.

A mutated model is loaded to the end: the model is built, its tokenizer made, and a pass is run.
"""

import functools
import io
import json
import os
import random
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
import transformers
from attacking import mutated_bytes, mutated_json, mutated_text

from gptk.kernels import checks
from gptk.plugins import provided
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint

Files = Mapping[str, bytes]
"""A model's files by their names."""

WORDS = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip

provided("loader")  # imports the plug-ins, which may take as long as an input may


@dataclass(frozen=True)
class Attacked:
    """Mutated files, and the spec that loads them."""

    files: Files
    spec: str

    @property
    def size(self) -> int:
        return sum(map(len, self.files.values()))


def load(attacked: Attacked) -> None:
    """Write the files, load the model, make its tokenizer, and run a pass."""
    checks.enabled = False  # compiling the kernels takes as long as an input may
    for name, content in attacked.files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    checkpoint = load_checkpoint(attacked.spec, stored=attacked.size % 2 == 0)
    model = build_model(checkpoint, "cpu", torch.float32, pack=True)
    with torch.inference_mode():
        model.logits(model(torch.zeros(1, 2, dtype=torch.long)[:, : model.config.context_length]))
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer().encode("Hello, world 123")


def expanded(attacked: Attacked) -> int:
    """At most what a file's tensors take as float32, from four bits each."""
    return 8 * attacked.size


def written(write: Callable[[Path], object]) -> Files:
    """The files that `write` writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = (path for path in Path(folder).rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def with_one(rng: random.Random, files: Files, change: Callable[[bytes], bytes]) -> Files:
    """The files, one of them changed; sometimes one is missing, or has the content of another."""
    name = rng.choice(sorted(files))
    changed = dict(files)
    kind = rng.randrange(20)
    if kind == 0:
        del changed[name]
    elif kind == 1:
        changed[name] = files[rng.choice(sorted(files))]
    else:
        changed[name] = change(files[name])
    return changed


def mutated_file(rng: random.Random, name: str, content: bytes) -> bytes:
    """By the kind of file: JSON by its fields, safetensors by its header, text by characters."""
    if rng.random() < 0.15:
        return mutated_bytes(rng, content)
    if name.endswith(".json"):
        text = mutated_json(rng, json.loads(content))
        return text.encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        return mutated_safetensors(rng, content)
    return mutated_text(rng, content.decode("utf-8", "replace")).encode("utf-8", "surrogatepass")


def mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.randrange(5)
    if kind == 0:
        length = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, 10**8])
        return struct.pack("<Q", length) + header + data
    if kind == 1:
        data = data[: rng.randrange(len(data))] + bytes(rng.choice([0, 4, 100]))
    elif kind == 2:
        header = mutated_bytes(rng, header)
    elif kind == 3:
        entries = json.loads(header)
        entry = entries[rng.choice(sorted(entries.keys() - {"__metadata__"}))]
        other = entries[rng.choice(sorted(entries.keys() - {"__metadata__"}))]
        field = rng.choice(["dtype", "shape", "data_offsets"])
        odd = {
            "dtype": ["BOOL", "C64", "F4", "F8_E5M2", "I64", "F64", "F16", "X", None],
            "shape": [[], [0], [2**62, 4], [-1], [[1]], None, [1, 97, 32]],
            "data_offsets": [[0, 0], [4, 0], [0, 2**63], [-4, 4], [0], None],
        }
        entry[field] = rng.choice([other[field], *odd[field]])
        header = json.dumps(entries).encode()
    else:
        header = mutated_json(rng, json.loads(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data


# --- Hugging Face ----------------------------------------------------------------------------


@functools.cache
def huggingface_files(family: str, shards: bool) -> Files:
    sizes: dict[str, Any] = WORDS | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
    }}  # fmt: skip
    if family == "gpt2":
        sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder, max_shard_size="9KB" if shards else "1GB")
        tokens = {chr(33 + number): number for number in range(90)} | {"Ġ": 90, "Ġa": 91, "ab": 92}
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
            "added_tokens": [{"id": 93, "content": "<|end|>", "special": True,
                              "normalized": False}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "post_processor": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": tokens, "merges": [["Ġ", "a"], ["a", "b"]]},
        }  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        about = {"eos_token": "<|end|>", "bos_token": {"content": "<|end|>"}, "chat_template": "x"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
        ends = {"eos_token_id": [93, 5], "bos_token_id": 3}
        (folder / "generation_config.json").write_text(json.dumps(ends))

    return written(write)


def test_hugging_face_directories(attack):
    def make(rng: random.Random) -> Attacked:
        family = rng.choice(["gpt2", "llama", "mistral", "qwen2", "qwen3"])
        files = huggingface_files(family, rng.random() < 0.3)
        name = rng.choice(sorted(files))
        changed = with_one(
            rng, {name: files[name]}, lambda content: mutated_file(rng, name, content)
        )
        rest = {n: x for n, x in files.items() if n != name}
        named = {f"model/{n}": x for n, x in {**rest, **changed}.items()}
        return Attacked(named, rng.choice(["model", "model", "huggingface:path=model"]))

    attack(make, load, expanded_bytes=expanded)


# --- gptk's own ------------------------------------------------------------------------------


@functools.cache
def gptk_files(rotary: bool) -> Files:
    from gptk import GPT, GPTConfig
    from gptk.weights.saving import save_checkpoint
    from gptk_plugins.tokenizers.byte_level import Bytes

    kinds: dict[str, Any] = (
        {"norm": "rms", "positions": "rotary", "mlp": "swiglu", "rope_factors": (2.0,) * 8}
        if rotary
        else {}
    )
    config = GPTConfig(
        vocab_size=300, context_length=32, width=32, n_layers=1, n_heads=2, n_kv_heads=2,
        head_dim=16, mlp_width=32, **kinds,
    )  # fmt: skip
    return written(lambda folder: save_checkpoint(folder / "model", GPT(config), Bytes().load()))


def test_gptks_own_directories(attack):
    def make(rng: random.Random) -> Attacked:
        files = gptk_files(rng.random() < 0.5)
        name = rng.choice(sorted(files))
        changed = with_one(rng, {name: files[name]}, lambda x: mutated_file(rng, name, x))
        rest = {n: x for n, x in files.items() if n != name}
        return Attacked({**rest, **changed}, rng.choice(["model", "gptk:path=model"]))

    attack(make, load, expanded_bytes=expanded)


# --- GGUF ------------------------------------------------------------------------------------


@functools.cache
def gguf_file(case: str, kind: str) -> bytes:
    import checkpoints

    files = written(
        lambda folder: checkpoints.write_gguf(
            folder / "x.gguf", checkpoints.random_model(case), kind
        )
    )
    return files["x.gguf"]


def gguf_places(data: bytes) -> list[tuple[int, int]]:
    """Where the numbers of the header, of the metadata and of the tensors' table are: (place,
    bytes)."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    places = [(4, 4), (8, 8), (16, 8)]
    kept = 0
    (n_tensors, n_fields), at = struct.unpack_from("<QQ", data, 8), 24

    def string(place: int) -> int:
        places.append((place, 8))
        (length,) = struct.unpack_from("<Q", data, place)
        places.append((place + 8, min(length, 8)))
        return int(place + 8 + length)

    for _ in range(n_fields):
        at = string(at)
        places.append((at, 4))
        (kind,) = struct.unpack_from("<I", data, at)
        at += 4
        count = 1
        if kind == 9:
            places += [(at, 4), (at + 4, 8)]
            kind, count = struct.unpack_from("<IQ", data, at)
            at += 12
        for item in range(count):
            if item == 3:  # the places of three items are enough
                kept = len(places)
            if kind == 8:
                at = string(at)
            else:
                places.append((at, sizes[kind]))
                at += sizes[kind]
        if count > 3:
            del places[kept:]
    for _ in range(n_tensors):
        at = string(at)
        (n_axes,) = struct.unpack_from("<I", data, at)
        places.append((at, 4))
        places += [(at + 4 + 8 * axis, 8) for axis in range(n_axes)]
        at += 4 + 8 * n_axes
        places += [(at, 4), (at + 4, 8)]
        at += 12
    return places


def mutated_places(rng: random.Random, data: bytes, places: list[tuple[int, int]]) -> bytes:
    """Numbers at such places set to others: limits, neighbours, those of other places."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place, size = rng.choice(places)
        now = int.from_bytes(changed[place : place + size], "little")
        other_place, other_size = rng.choice(places)
        other = int.from_bytes(changed[other_place : other_place + other_size], "little")
        odd = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**40, 10**9]
        value = rng.choice(
            [*odd, now + 1, now - 1, now * 2, now // 2, now ^ (1 << rng.randrange(64)), other]
        )
        changed[place : place + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(changed)


GGUF_CASES = [
    (case, kind)
    for case in ("gpt2", "llama", "llama-llama3-rope", "qwen2", "qwen3")
    for kind in ("F32", "Q8_0", "Q4_0", "Q4_1", "BF16")
]


def test_gguf_files(attack):
    def make(rng: random.Random) -> Attacked:
        data = gguf_file(*rng.choice(GGUF_CASES))
        kind = rng.randrange(10)
        if kind < 6:
            data = mutated_places(rng, data, gguf_places(data))
        elif kind == 6:
            data = mutated_bytes(rng, data)
        elif kind == 7:
            data = data[: rng.randrange(len(data))]
        else:
            head = mutated_bytes(rng, data[:4000])
            data = head + data[4000:]
        return Attacked({"x.gguf": data}, rng.choice(["x.gguf", "gguf:path=x.gguf"]))

    attack(make, load, expanded_bytes=expanded)


# --- Files of torch.save ---------------------------------------------------------------------


@functools.cache
def torch_file(kind: str, legacy: bool) -> bytes:
    from llms_from_scratch.ch04 import GPTModel

    torch.manual_seed(0)
    settings = {
        "vocab_size": 60, "context_length": 16, "emb_dim": 32, "n_heads": 4, "n_layers": 1,
        "drop_rate": 0.0, "qkv_bias": False,
    }  # fmt: skip
    state: Any = GPTModel(settings).state_dict()
    if kind == "nanogpt":
        names = {
            "tok_emb.weight": "transformer.wte.weight", "pos_emb.weight": "transformer.wpe.weight",
            "trf_blocks.0.norm1.scale": "transformer.h.0.ln_1.weight",
            "trf_blocks.0.norm2.scale": "transformer.h.0.ln_2.weight",
            "trf_blocks.0.att.out_proj.weight": "transformer.h.0.attn.c_proj.weight",
            "trf_blocks.0.ff.layers.0.weight": "transformer.h.0.mlp.c_fc.weight",
            "trf_blocks.0.ff.layers.2.weight": "transformer.h.0.mlp.c_proj.weight",
            "final_norm.scale": "transformer.ln_f.weight", "out_head.weight": "lm_head.weight",
        }  # fmt: skip
        weights = {theirs: state[ours] for ours, theirs in names.items()}
        weights["transformer.h.0.attn.c_attn.weight"] = torch.randn(96, 32)
        arguments = {
            "n_layer": 1, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 60,
            "bias": False, "dropout": 0.0,
        }  # fmt: skip
        state = {"model": weights, "model_args": arguments, "iter_num": 7, "config": {"a": "b"}}
    if kind == "optimizer":
        state = {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "lr": 0.1}}

    def write(folder: Path) -> None:
        torch.save(state, folder / "x", _use_new_zipfile_serialization=not legacy)

    return written(write)["x"]


def mutated_pickle(rng: random.Random, pickle: bytes) -> bytes:
    """Numbers, names and instructions changed."""
    kind = rng.randrange(5)
    if kind == 0:
        return mutated_bytes(rng, pickle)
    if kind == 1:  # a count, stride, size or offset
        found = list(re.finditer(rb"K.|M..|J....", pickle, re.DOTALL))
        match = rng.choice(found)
        number = rng.choice([0, 1, 2, 255, 65535, -1, 2**31 - 1, -(2**31), 10**6])
        return pickle[: match.start()] + b"J" + struct.pack("<i", number) + pickle[match.end() :]
    if kind == 2:
        names = [
            b"ctorch\nFloatStorage\n", b"ctorch\nDoubleStorage\n", b"ctorch\nBoolStorage\n",
            b"ctorch\nComplexFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\nOrderedDict\n", b"ctorch\nSize\n", b"cbuiltins\nbytearray\n",
            b"cos\nsystem\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch\nbfloat16\n",
            b"ctorch\nHalfStorage\n", b"ctorch\nQInt8Storage\n", b"ctorch\ndevice\n",
        ]  # fmt: skip
        match = rng.choice(list(re.finditer(rb"c[\w.]+\n\w+\n", pickle)))
        return pickle[: match.start()] + rng.choice(names) + pickle[match.end() :]
    if kind == 3:
        place = rng.randrange(2, len(pickle))
        codes = b"().012NQR]abdehjlopqrstu}\x81\x85\x86\x87\x88\x89\x8f\x90\x93\x94"
        extra = bytes([rng.choice(codes)]) * rng.choice([1, 1, 2, 1000])
        return pickle[:place] + extra + pickle[place + rng.choice([0, 1]) :]
    names = re.findall(rb"X(....)([\w.]+)", pickle, re.DOTALL)
    name, other = rng.choice(names)[1], rng.choice(names)[1]
    new = rng.choice([other, b"", b"\xff", b"a" * 1000, b"0", b"99", b"cuda:0", b"meta"])
    old = b"X" + struct.pack("<I", len(name)) + name
    return pickle.replace(old, b"X" + struct.pack("<I", len(new)) + new, 1)


def mutated_zip(rng: random.Random, data: bytes) -> bytes:
    """An archive with a mutated pickle, other contents, other names, or another method."""
    out = io.BytesIO()
    kind = rng.randrange(7)
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = rng.choice(names)
        for name in names:
            content, method = old.read(name), zipfile.ZIP_STORED
            if name.endswith("data.pkl") and kind < 4:
                content = mutated_pickle(rng, content)
            elif name == chosen and kind == 4:
                content = rng.choice([content[:-4], content + bytes(4), b"", bytes(10**5)])
            elif name == chosen and kind == 5:
                method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
            elif name == chosen:
                odd = ["constants.pkl", "byteorder", "data/0", "version", ".format_version"]
                name = f"x/{rng.choice(odd)}"
            new.writestr(name, content, method)
    return out.getvalue()


def zip_places(data: bytes) -> list[tuple[int, int]]:
    """The fields of the entries' headers, of the directory, and of its end."""
    places = []
    for mark, fields in (
        (b"PK\3\4", [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)]),
        (b"PK\1\2", [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (34, 2), (42, 4)]),
        (b"PK\5\6", [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)]),
    ):
        for match in re.finditer(re.escape(mark), data):
            places += [(match.start() + place, size) for place, size in fields]
    return places


def test_files_of_torch_save(attack):
    def make(rng: random.Random) -> Attacked:
        kind, legacy = rng.choice(["book", "nanogpt", "optimizer"]), rng.random() < 0.3
        data = torch_file(kind, legacy)
        how = rng.randrange(10)
        if how < 2:
            data = mutated_bytes(rng, data)
        elif how == 2:
            data = data[: rng.randrange(len(data))]
        elif legacy:
            data = mutated_pickle(rng, data[:6000]) + data[6000:]
        elif how < 5:
            data = mutated_places(rng, data, zip_places(data))
        else:
            data = mutated_zip(rng, data)
        loader = "nanogpt" if kind == "nanogpt" else "llms-from-scratch"
        options = "" if kind == "nanogpt" else ",n_heads=4"
        spec = rng.choice(["x.pth", f"{loader}:path=x.pth{options}"])
        return Attacked({"x.pth": data}, spec)

    attack(make, load, expanded_bytes=expanded)


# --- TensorFlow ------------------------------------------------------------------------------

DATA = Path(__file__).parent.parent / "builtins" / "openai"


def masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def mutated_index(rng: random.Random, data: bytes) -> bytes:
    """The first block changed, with a right checksum, so that the parser gets to see it; or its
    handles, in the last 48 bytes."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutated_bytes(rng, data)
    if kind == 1:
        return data[:-48] + mutated_bytes(rng, data[-48:-8])[:40].ljust(40, b"\0") + data[-8:]
    # The block ends where the checksum of what is before fits.
    for end in range(1, len(data) - 5):
        if struct.unpack_from("<I", data, end + 1)[0] == masked(data[: end + 1]):
            break
    else:
        return data
    block = bytearray(data[:end])
    for _ in range(rng.choice([1, 1, 2, 4])):
        block[rng.randrange(len(block))] = rng.choice([0, 1, 8, 127, 128, 255, rng.randrange(256)])
    if kind == 3:
        place = rng.randrange(len(block))
        block[place : place + 1] = block[place : place + 1] * 2
        block = block[:end]
    changed = bytes(block) + data[end : end + 1]
    return changed + struct.pack("<I", masked(changed)) + data[end + 5 :]


def test_tensorflow_checkpoints(attack):
    def make(rng: random.Random) -> Attacked:
        folder = rng.choice(sorted(path for path in DATA.iterdir() if path.is_dir()))
        files = {
            f"model/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()
        }
        name = rng.choice(sorted(files))
        if name.endswith(".index"):
            files[name] = mutated_index(rng, files[name])
        else:
            files |= with_one(rng, {name: files[name]}, lambda x: mutated_file(rng, name, x))
        return Attacked(files, rng.choice(["model", "openai:path=model"]))

    attack(make, load, expanded_bytes=expanded)


# --- What is no model ------------------------------------------------------------------------


def test_sources_and_what_is_at_their_paths(attack):
    """Paths, names and specs that users could type, and odd things in the files' places."""
    specs = [
        "smollm2", "gpt2", "openai-community/gpt2", "x.gguf", "x.pth", "gguf:path=x", "model",
        "huggingface:path=model,revision=main", "nanogpt:path=x,gelu=tanh", "./model", "model/",
        "llms-from-scratch:path=x,n_heads=4", "gptk:path=model", "openai:path=model", "/dev/null",
    ]  # fmt: skip

    names = ["x", "x.gguf", "x.pth", "gpt2"]
    names += [f"model/{name}" for name in ("config.json", "gptk.json", "model.safetensors")]
    names += [f"model/{name}" for name in ("tokenizer.json", "hparams.json", "model.ckpt.index")]
    kinds = ["nothing", "fifo", "directory", "device", "link", "empty", "zip", "json"]

    def make(rng: random.Random) -> tuple[str, dict[str, str]]:
        spec = rng.choice(specs)
        if rng.random() < 0.4:
            spec = mutated_text(rng, spec)
        usual = rng.choice(kinds)
        return spec, {name: rng.choice([usual, rng.choice(kinds)]) for name in names}

    def run(typed: tuple[str, dict[str, str]]) -> None:
        spec, files = typed
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name, kind in files.items():
            put(Path(name), kind)
        if "smollm2" in spec:
            return
        load_checkpoint(spec)

    attack(make, run)


def put(path: Path, kind: str) -> None:
    """Make something of this kind in the place of a file."""
    path.parent.mkdir(exist_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "link":
            path.symlink_to(path.name)
        case "zip":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("x/data.pkl", zlib.compress(bytes(1000)))
        case "json":
            path.write_text('{"model_type": "llama", "format_version": 1}')
        case "empty":
            path.touch()
