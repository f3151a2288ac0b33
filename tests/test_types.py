"""Shape annotations are checked: conftest.py's import hook refuses other arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from cnnjax import nn as cnn
from cnnjax.data.augment import augment
from cnnjax.position.metrics import by_ring
from cnnjax.transfer import linear_probe


def test_a_wrong_rank_is_refused():
    for call in (cnn.global_avg_pool, lambda x: cnn.max_pool(x, 2), lambda x: cnn.resize(x, 4)):
        assert call(jnp.ones((1, 4, 4, 2))).shape[0] == 1
        with pytest.raises(TypeCheckError, match="batch height width channels"):
            call(jnp.ones((4, 4, 2)))


def test_axes_of_one_name_must_agree():
    x = np.random.default_rng(0).standard_normal((10, 3))
    linear_probe(x, np.arange(10) % 2, x, np.arange(10) % 2)
    # Nine labels do not fit the features of ten examples.
    with pytest.raises(TypeCheckError, match="labels"):
        linear_probe(x, np.arange(9) % 2, x, np.arange(10) % 2)
    # A target of 6x5 does not fit maps of 6x6.
    with pytest.raises(TypeCheckError, match="target"):
        by_ring(np.ones((1, 6, 6)), np.ones((6, 5)), 2)
    # Three keys do not fit two images, also in traced code.
    with pytest.raises(TypeCheckError, match="images"):
        jax.eval_shape(
            augment, jax.random.split(jax.random.key(0), 3), jnp.zeros((2, 8, 8, 3), jnp.uint8)
        )


def test_a_wrong_dtype_and_a_wrong_result_are_refused():
    x = jnp.ones((1, 4, 4, 2))
    with pytest.raises(TypeCheckError, match="Float"):
        cnn.global_avg_pool(x.astype(jnp.int32))

    def five_features(key, shape, dtype):
        return jnp.ones((*shape[:3], 5), dtype)

    layer = cnn.Conv(4, 3, kernel_init=five_features, use_bias=False)
    with pytest.raises(TypeCheckError, match="return value"):
        layer.init(jax.random.key(0), x)
