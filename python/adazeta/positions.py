"""How many tokens a model with a table of positions takes; more would be an index error from deep inside."""

from torch import nn

#: What `transformers` calls a table of absolute positions. Rotary, relative and sinusoidal ones have no end.
TABLES = ("position_embeddings", "embed_positions", "wpe")


def most_positions(model: nn.Module) -> int | None:
    """Return the most tokens of a row that the model has positions for; None where there is no table."""
    found = [
        # OPT and BART keep rows of the table free in front, RoBERTa those up to its padding's.
        table.num_embeddings - getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in TABLES
    ]
    return min(found, default=None)
