import importlib

import pytest
import timm

import visionattn
from visionattn.weights.families import FILTERS, release_filter


@pytest.mark.parametrize("name", visionattn.list_models())
def test_every_model_s_filter_is_the_one_its_family_declares(name):
    module = importlib.import_module(timm.models.model_entrypoint(name).__module__)
    assert release_filter(name) is FILTERS[name] is module.checkpoint_filter_fn


def test_nothing_else_is_declared():
    assert FILTERS.keys() == set(visionattn.list_models())


def test_a_tag_and_the_meta_device_change_nothing():
    assert release_filter("nat_mini.in1k") is release_filter("nat_mini")
    model = timm.create_model("agent_swin_t", device="meta")
    assert release_filter(model.pretrained_cfg["architecture"], model) is FILTERS["agent_swin_t"]


def test_timm_s_own_families_are_found_beside_their_models():
    from timm.models import swin_transformer

    assert release_filter("swin_tiny_patch4_window7_224") is swin_transformer.checkpoint_filter_fn
    model = timm.create_model("swin_tiny_patch4_window7_224", device="meta")
    assert release_filter("", model) is swin_transformer.checkpoint_filter_fn
    assert release_filter("resnet18") is None
