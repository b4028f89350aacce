"""Train JoeyNMT's RNN on batches from a file: `PYTHON benchmarks/joeynmt_rnn.py BATCHES.npz '{"vocabulary": ...}'`.

`benchmarks.translation` runs this with the interpreter of an environment that has joeynmt, because joeynmt's
requirements clash with onnx's. Prints the seconds of each pass over the batches as JSON. The first pass does not count.
"""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from joeynmt.decoders import RecurrentDecoder
from joeynmt.embeddings import Embeddings
from joeynmt.encoders import RecurrentEncoder
from joeynmt.model import Model
from joeynmt.vocabulary import Vocabulary


def build(vocabulary: int, size: int, dropout: float, smoothing: float, input_feeding: bool) -> Model:
    """Return a bidirectional LSTM encoder and an LSTM decoder with Luong's general attention."""
    symbols = {"unk": ("<unk>", 1), "pad": ("<pad>", 0), "bos": ("<s>", 2), "eos": ("</s>", 3)}
    config = SimpleNamespace(sep_token=None, sep_id=None, lang_tags=["<pad>", "<unk>", "<s>", "</s>"])
    for name, (token, number) in symbols.items():
        setattr(config, f"{name}_token", token)
        setattr(config, f"{name}_id", number)
    # JoeyNMT's vocabulary begins with <unk>; the batches have dlref's numbers.
    config.unk_id, config.pad_id = 0, 1
    words = Vocabulary([str(i) for i in range(vocabulary - 4)], config)
    embeddings = [Embeddings(size, vocab_size=vocabulary, padding_idx=1) for _ in range(2)]
    common = {"rnn_type": "lstm", "emb_size": size, "num_layers": 1, "dropout": dropout, "emb_dropout": dropout}
    encoder = RecurrentEncoder(hidden_size=size // 2, bidirectional=True, **common)
    decoder = RecurrentDecoder(
        hidden_size=size,
        encoder=encoder,
        attention="luong",
        vocab_size=vocabulary,
        hidden_dropout=dropout,
        init_hidden="bridge",
        input_feeding=input_feeding,
        **common,
    )
    model = Model(encoder, decoder, *embeddings, words, words)
    model.loss_function = ("crossentropy", smoothing)
    return model.train()


def main() -> None:
    """Train on every batch, several times."""
    path, options = sys.argv[1], json.loads(sys.argv[2])
    passes, threads = options.pop("passes"), options.pop("threads")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(**options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with np.load(path) as arrays:
        count = len(arrays.files) // 2
        batches = [[torch.from_numpy(arrays[f"{side}{i}"]) for side in ("source", "target")] for i in range(count)]
    prepared = []
    swap = torch.tensor([1, 0])  # JoeyNMT's padding is 1, dlref's 0
    for source, target in batches:
        source, target = (torch.where(part < 2, swap[part.clamp(max=1)], part) for part in (source, target))
        lengths = (source != 1).sum(1)
        order = lengths.argsort(descending=True)  # as JoeyNMT's packing requires
        source, target, lengths = source[order], target[order], lengths[order]
        after = target[:, 1:]
        masks = {"src_mask": (source != 1)[:, None], "trg_mask": (after != 1)[:, None]}
        prepared.append({"src": source, "src_length": lengths, "trg_input": target[:, :-1], "trg": after, **masks})
    seconds = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        for batch in prepared:
            loss, *_ = model(return_type="loss", **batch)
            (loss / batch["trg_mask"].sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    print(json.dumps(seconds[1:]))


if __name__ == "__main__":
    main()
