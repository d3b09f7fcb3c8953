"""A source's batches, each with the format of its rows."""

from collections.abc import Iterator

from finetune.data.reading.files import RawBatch, read_batches
from finetune.data.reading.formats import Format, format_of
from finetune.data.reading.sources import Source


def read_formatted(
    source: Source, rows_per_batch: int, questions_only: bool = False
) -> Iterator[tuple[RawBatch, Format]]:
    """The batches of `read_batches`, each with the format that the first one of its file shows.

    Raises:
        ValueError: as `read_batches` and `format_of`, or two files of the source have different formats.
    """
    first: tuple[str, Format, list[str]] | None = None
    here: tuple[str, Format] | None = None
    for batch in read_batches(source, rows_per_batch):
        if here is None or here[0] != batch.where:
            objects = batch.objects()
            columns = list(dict.fromkeys(column for row in objects for column in row))
            found = format_of(columns, source.columns, batch.where, objects[0], questions_only)
            here = (batch.where, found)
            first = first or (batch.where, found, columns)
            if found.name != first[1].name:
                raise ValueError(
                    f"{batch.where} has the columns {columns}, {first[0]} has {first[2]}; a source has one "
                    "format: name each file in data.path as {path: FILE}"
                )
        yield batch, here[1]
