"""What people get wrong is told in one line, before anything is written."""

from adazeta import options
from adazeta.prepare import load_data


def test_a_class_of_one_example_is_noted(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(8)) + "odd,fine\n"
    )
    told = []
    settings = options.resolve({"data": str(path), "task": "head"}, options.TRAIN)
    _, settings = load_data(settings, told.append)
    assert settings["labels"] == ["bad", "fine", "good"]
    assert told == ["note: one example only of 'fine': is that a class?"]
