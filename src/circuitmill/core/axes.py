"""The words that name tensor axes in every signature of the package.

`Float[Tensor, "token layer d_model"]` and the einops patterns in the bodies use these words and no others; a
test collects all annotations and compares. A new word needs an entry here.
"""

AXES: dict[str, str] = {
    "token": "one token of a batch, whatever text it came from",
    "pos": "position inside a sequence or a prompt",
    "sequence": "one packed, fixed-length row of tokens",
    "layer": "a place in the language model, or in one of several: its block, or a hookpoint of it",
    "source": "a group of features that share what they read: one layer, except in a crosscoder",
    "target": "a layer that a feature writes to; index k of source s is the k-th layer that s writes to",
    "pair": "one (source, target) pair, sources first",
    "read": "one (source, layer that it reads) pair, sources first",
    "transform": "one linear map of a mixture of transforms",
    "feature": "a learned unit; per layer unless flattened over layers",
    "d_model": "the residual stream's width",
    "d_vocab": "the tokenizer's vocabulary",
    "group": "consecutive numbers that share one scale in quantised storage",
    "window": "a short span of text around one token",
    "item": "one question of a task",
    "node": "a node of an attribution graph",
    "rank": "one process of a distributed run; in a low-rank decoder, one number between features and output",
    "entry": "one (token, feature) place of a matrix of which few places are kept",
    "bin": "a bar of a histogram",
    "step": "one quantisation step of the grid whose cost in bits is measured",
    "block": "tokens that are read together: a chunk of a stored shard, a batch of a running model",
    "row": "one row of a matrix, or of stored numbers",
    "column": "one column of a matrix",
    "size": "rows and columns of a square matrix",
    "byte": "a byte of packed codes",
    "pool": "tokens that are shuffled together in memory",
    "all_tokens": "the tokens of all ranks, first rank first",
    "firing": "one (token, feature) pair in which the feature fires",
}
"""What each axis word stands for."""
