"""The settings of data and task: where examples are read, how they become prompts, what is asked."""

from __future__ import annotations

from adazeta.kinds import boolean, escaped, integer, label_words, listed, mapping, positive, positive_or_auto
from adazeta.option import Option

DATA = [
    Option(
        "data",
        str,
        "'movies', a .csv, .tsv, .jsonl or .parquet file, a folder that `datasets` saved, or "
        "hub:OWNER/NAME[:CONFIG][@REVISION]",
        "movies",
    ),
    Option("text-column", str, "column (key) that fills {text} in the template", "text"),
    Option(
        "columns",
        mapping,
        "columns of other names than the template's, name=column,name=column; a dot looks into nested rows",
        shown="each {name} of the template is a column of that name",
    ),
    Option("label-column", str, "column (key) that holds the label, or a list of right answers", "label"),
    Option(
        "choices-column",
        listed,
        "column (key) with the candidates of a choice: a list, or a|b|c; or a column each",
        ["choices"],
        tasks=("choice",),
    ),
    Option(
        "label-names",
        listed,
        "what labels that are numbers from 0 stand for, separated by commas",
        tasks=("label-words", "head"),
    ),
    Option("skip-labels", listed, "rows with these labels are left out, separated by commas"),
    Option(
        "blank",
        str,
        "choice: text in the template's last column that a candidate fills, such as '@placeholder'",
        tasks=("choice",),
    ),
]
SPLITTING = [
    Option("split", str, "part of --data that is trained on, where it has several", "train"),
    Option("dev-data", str, "dev examples, as --data", shown="a tenth of the data, at most 500"),
    Option("dev-split", str, "part of --dev-data, where it has several", "validation"),
    Option("eval-split", str, "part of --data that `adazeta eval` takes by itself, where it has several", "test"),
    Option(
        "shots", positive, "train on so many examples of each class, and hold out as many for dev", shown="all examples"
    ),
    Option("shots-seed", integer, "seed by which they are drawn", 0),
]
TASK = [
    Option(
        "dataset-template",
        str,
        "settings for a public dataset by name: task, template, label words, columns and metric; `adazeta templates` "
        "lists them",
    ),
    Option(
        "task",
        str,
        "what is learned: label-words, head (classes by a head that trains too), choice (between candidates of each "
        "example) or completion (the label is the answer); auto: label-words where the model has a language-model head",
        "auto",
        choices=("auto", "label-words", "head", "choice", "completion"),
    ),
    Option(
        "template",
        escaped,
        r"prompt, with columns of the data in braces, such as {text}, once each, and {mask} where a masked model fills "
        r"the word in (others go on from what stands before a {mask} at the end); \n is a newline",
        shown=r"'Review: {text}\nSentiment:' for label words of causal models, with {mask} of others; else '{text}'",
    ),
    Option(
        "label-words",
        label_words,
        "class labels and the words the model answers with, label=word,label=word; a space goes before each word",
        {"negative": " negative", "positive": " positive"},
        tasks=("label-words",),
    ),
    Option(
        "labels",
        listed,
        "class labels of a head, separated by commas",
        shown="those in the data, sorted",
        tasks=("head",),
    ),
    Option(
        "pooling",
        str,
        "head: own (the model's), mean (of the hidden states), or attention (a mean whose weights train)",
        choices=("own", "mean", "attention"),
        shown="own; for an encoder without a head attention with --depth auto, in a private run mean",
        tasks=("head",),
    ),
    Option(
        "head",
        str,
        "head: the linear layers before its last (RoBERTa's, or a pooler that the checkpoint lacks) train in full, or "
        "stay and get TT adapters, which are far fewer numbers",
        "full",
        choices=("full", "tt"),
        tasks=("head",),
    ),
    Option(
        "depth",
        positive_or_auto,
        "head of --pooling mean or attention: blocks of the model that run, and behind which it reads; the others are "
        "left out. auto: the number whose hidden states tell the training examples apart best",
        shown="all",
        tasks=("head",),
    ),
    Option(
        "head-start",
        str,
        "head: its last layer begins fitted (logistic regression on the frozen model's features of the training "
        "examples) or random",
        choices=("fitted", "random"),
        shown="fitted; random in a private run",
        tasks=("head",),
    ),
    Option(
        "normalize",
        boolean,
        "choice: divide a candidate's log likelihood by its number of tokens",
        True,
        tasks=("choice",),
    ),
    Option("max-tokens", positive, "longest prompt, in tokens; longer texts lose their end", 256),
]
