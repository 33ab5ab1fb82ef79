"""The header that the kernels and plugins compile against says what the op set says."""

from mla_trt.plugins import op_table


def test_header_in_the_repository_is_what_the_op_set_gives():
    assert op_table.HEADER.read_text() == op_table.header(), "run python -m mla_trt.plugins.op_table"
