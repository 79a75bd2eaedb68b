import sys

import pytest

from tests import timm_suite


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="timm's suite is run on Linux")
def test_timm_s_own_suite_passes_for_our_models():
    assert timm_suite.main([]) == 0
