"""text8: 10^8 letters and spaces of the English Wikipedia (Mahoney)."""

from experiments.data.builders._byte_blocks import HundredMillionBuilder
from experiments.data.preparation import SourceFile

URL = "http://mattmahoney.net/dc/text8.zip"


class Builder(HundredMillionBuilder):
    """text8, split 90 / 5 / 5 million bytes."""

    DESCRIPTION = "10^8 bytes of the English Wikipedia reduced to a-z and spaces, 90 / 5 / 5 million."
    HOMEPAGE = "http://mattmahoney.net/dc/textdata.html"
    SOURCES = (
        SourceFile("text8.zip", URL, "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"),
        SourceFile("text8.gz", URL),
        SourceFile("text8", URL),
    )
    CONTENTS = "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7"
