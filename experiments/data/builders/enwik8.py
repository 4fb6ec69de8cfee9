"""enwik8: the first 10^8 bytes of the English Wikipedia's XML dump of 3 March 2006 (Mahoney)."""

from experiments.data.builders._byte_blocks import HundredMillionBuilder
from experiments.data.preparation import SourceFile

URL = "http://mattmahoney.net/dc/enwik8.zip"


class Builder(HundredMillionBuilder):
    """enwik8, split 90 / 5 / 5 million bytes."""

    DESCRIPTION = "The first 10^8 bytes of the English Wikipedia's XML dump of 3 March 2006, 90 / 5 / 5 million."
    HOMEPAGE = "http://mattmahoney.net/dc/textdata.html"
    SOURCES = (
        SourceFile("enwik8.zip", URL, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
        SourceFile("enwik8.gz", URL),
        SourceFile("enwik8", URL),
    )
    CONTENTS = "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8"
