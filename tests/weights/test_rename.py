import logging

import pytest
import torch
import torch.nn.functional as F

from visionattn.weights.rename import resize_axes, resize_tokens, unwrap


def test_two_axes_of_a_table_are_resized_wherever_they_lie(caplog):
    caplog.set_level(logging.INFO)
    table = torch.randn(3, 13, 13)
    expected = F.interpolate(table[None], (21, 21), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(resize_axes(table, (21, 21), (1, 2), name="rpb"), expected)
    moved = resize_axes(table.permute(1, 2, 0), (21, 21), (0, 1))
    torch.testing.assert_close(moved, expected.permute(1, 2, 0))
    assert "rpb resized from 13x13 to 21x21 (bicubic)" in caplog.text


def test_one_axis_is_resized_linearly():
    table = torch.arange(12.0).reshape(2, 6, 1)
    expected = F.interpolate(table.transpose(1, 2), 9, mode="linear", align_corners=False).transpose(1, 2)
    torch.testing.assert_close(resize_axes(table, (9,), (1,), mode="linear"), expected)


def test_position_embeddings_keep_the_rows_before_the_grid():
    table = torch.randn(1, 1 + 4 * 4, 8)
    grid = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    resized = resize_tokens(table, (6, 5), prefix=1)
    assert resized.shape == (1, 31, 8) and torch.equal(resized[:, 0], table[:, 0])
    expected = F.interpolate(grid, (6, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resized[:, 1:], expected)


def test_bias_tables_of_rows_are_grids_too():
    table = torch.randn(13 * 13, 4)
    expected = F.interpolate(table.T.reshape(1, 4, 13, 13), (23, 23), mode="bicubic").reshape(4, -1).T
    torch.testing.assert_close(resize_tokens(table, (23, 23)), expected)
    oblong = resize_tokens(torch.randn(15, 2), (6, 10), old=(3, 5))
    assert oblong.shape == (60, 2)


def test_tables_of_the_right_size_are_returned_as_they_are(caplog):
    table = torch.randn(2, 5, 5)
    assert resize_axes(table, (5, 5), (1, 2)) is table
    assert resize_tokens(table, (1, 5), old=(1, 5)) is table
    assert caplog.text == ""


def test_dtype_is_kept_and_the_arithmetic_is_float32():
    table = torch.randn(2, 5, 5, dtype=torch.float16)
    resized = resize_axes(table, (9, 9), (1, 2))
    assert resized.dtype == torch.float16
    torch.testing.assert_close(resized, resize_axes(table.float(), (9, 9), (1, 2)).half())


@pytest.mark.parametrize("rows, prefix, old", [(15, 0, None), (16, 1, None), (16, 0, (3, 5)), (2, 3, None)])
def test_rows_that_are_no_grid_are_refused(rows, prefix, old):
    with pytest.raises(ValueError, match=f"pos_embed has {rows} rows, which are not"):
        resize_tokens(torch.zeros(rows, 2), (7, 7), prefix, old, name="pos_embed")


def test_axes_that_do_not_match_sizes_are_refused():
    with pytest.raises(ValueError, match="the same one or two axes"):
        resize_axes(torch.zeros(2, 3, 3), (5,), (1, 2))


def test_unwrapping_prefers_averaged_weights():
    assert unwrap({"model": {"a": 1}, "state_dict_ema": {"module.a": 2}}) == {"a": 2}
    assert unwrap({"_orig_mod.module.a": 2}) == {"a": 2}
