"""Every expression: its matrix, its closed-form gradient and its product, in float64."""

from dataclasses import dataclass

import pytest
import torch
from helpers.method_cases import close

from diffadapt.algebra.class_table_expression import NewClassTable
from diffadapt.algebra.expression import ExportForm, Expression, Update
from diffadapt.algebra.full_rank import (
    ColumnScaled,
    Dense,
    EntrywiseProduct,
    Kron,
    LowRankHadamard,
    RelativeChange,
    Replacement,
    ReshapedLowRank,
    Scaled,
    Sum,
)
from diffadapt.algebra.layer_maps import ConvMap, LinearMap
from diffadapt.algebra.low_rank import (
    FeatureSum,
    LowRank,
    LowRankDifference,
    LowRankWithCore,
    Reparametrized,
    ScaledFactors,
    Tucker,
    TuckerWithKernelFactors,
)
from diffadapt.methods.grouped import slices
from diffadapt.methods.mora import SquareBetween


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def low_rank(rows=6, columns=8, rank=2):
    return LowRank(rand(rows, rank), rand(rank, columns))


EXPRESSIONS = {
    "low-rank": low_rank,
    "tucker": lambda: Tucker(rand(6, 3), rand(3, 2, 3, 1), rand(2, 4)),
    "tucker-without-kernel": lambda: Tucker(rand(6, 3), rand(3, 2), rand(2, 8)),
    "scaled": lambda: Scaled(low_rank(), -1.5),
    "sum": lambda: Sum(low_rank(), Scaled(low_rank(rank=1), 2.0)),
    "cored": lambda: LowRankWithCore(rand(6, 3), rand(3, 2), rand(2, 8)),
    "cored-tall": lambda: LowRankWithCore(rand(9, 3), rand(3, 2), rand(2, 8)),
    "cored-tucker": lambda: TuckerWithKernelFactors(
        rand(6, 3), rand(3, 2, 2, 1), rand(2, 4), rand(3, 2), rand(2, 1)
    ),
    "scaled-factors": lambda: ScaledFactors(rand(6, 2), rand(2, 8), rand(6), rand(2)),
    "since-start": lambda: LowRankDifference(rand(6, 2), rand(2, 8), rand(6, 2), rand(2, 8)),
    "dense": lambda: Dense(rand(6, 2, 2, 2)),
    "replace": lambda: Replacement(rand(6, 8), rand(6, 8)),
    "fewer-rows": lambda: NewClassTable(rand(6, 8), rand(4, 8), null_class=True),
    "more-rows": lambda: NewClassTable(rand(6, 8), rand(9, 8), null_class=True),
    "more-rows-without-null": lambda: NewClassTable(rand(6, 8), rand(9, 8), null_class=False),
    "folded": lambda: ReshapedLowRank(low_rank(4, 12), (6, 8)),
    "hadamard": lambda: RelativeChange(rand(6, 2, 2, 2), low_rank()),
    "hadamard-exponential": lambda: RelativeChange(rand(6, 8), low_rank(), True),
    "column-scaled": lambda: ColumnScaled(rand(6, 2, 2, 2), low_rank(), rand(8), 1.5),
    "entrywise-product": lambda: EntrywiseProduct(low_rank(), Sum(low_rank(), low_rank())),
    "hadamard-pair": lambda: LowRankHadamard(low_rank(), low_rank(rank=3)),
    "kron": lambda: Kron(rand(2, 4), low_rank(3, 2)),
    "kron-of-kron": lambda: Kron(rand(2, 2), Kron(rand(1, 2), low_rank(3, 2))),
    "feature-sum": lambda: FeatureSum(rand(6), 8),
    "feature-sum-in-shares": lambda: FeatureSum(rand(6), 8, 0.25),
    "kron-rows": lambda: slices.KronRows(rand(6, 2), low_rank(6, 4)),
    "slice": lambda: slices.Slice(low_rank(4, 16), 4, 16, 15, 7, (6, 8)),
    "joined-between-rows": lambda: slices.Joined(low_rank(2), low_rank(4), 16, (6, 8)),
    "joined-inside-a-row": lambda: slices.Joined(low_rank(1, 11), low_rank(1, 37), 11, (6, 8)),
}
UNTRAINED = {  # fields that are constants or base weights: no gradient
    "replace": 1,
    "fewer-rows": 1,
    "more-rows": 1,
    "more-rows-without-null": 1,
    "hadamard": 1,
    "hadamard-exponential": 1,
    "column-scaled": 1,
    "scaled-factors": 2,
    "since-start": 2,
}
every = pytest.mark.parametrize("make", EXPRESSIONS.values(), ids=EXPRESSIONS)


def subclasses(cls):
    for sub in cls.__subclasses__():
        if sub.__module__.startswith("diffadapt."):
            yield sub
        yield from subclasses(sub)


def test_every_expression_defined_beside_the_algebra_is_tried_here():
    tried = {type(make()) for make in EXPRESSIONS.values()}
    tried_with_their_methods = ("diffadapt.methods.", "diffadapt.formats.export.")
    beside_the_algebra = []
    for sub in subclasses(Expression):
        is_grouped = sub.__module__.startswith("diffadapt.methods.grouped.")
        if is_grouped or not sub.__module__.startswith(tried_with_their_methods):
            beside_the_algebra.append(sub)
    shared = set(beside_the_algebra) - {Reparametrized, ExportForm}
    assert shared == tried


@every
def test_the_closed_form_gradient_equals_autograd(make):
    expression = make()
    factors = [factor.requires_grad_() for factor in expression.tensors()]
    matrix = expression.with_tensors(factors).matrix()
    grad = rand(*matrix.shape)
    expected = torch.autograd.grad(matrix, factors, grad, allow_unused=True)
    factor_grads = expression.vjp(grad)
    assert len(factor_grads) == len(factors)
    for factor_grad, expected_grad in zip(factor_grads, expected, strict=True):
        if factor_grad is not None:
            close(factor_grad, expected_grad, 1e-12)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_only_constants_have_no_gradient(name):
    expression = EXPRESSIONS[name]()
    factor_grads = expression.vjp(rand(*expression.matrix().shape))
    assert factor_grads.count(None) == UNTRAINED.get(name, 0)


@every
def test_with_tensors_puts_the_factors_back_in_their_places(make):
    expression = make()
    again = expression.with_tensors(expression.tensors())
    assert all(a is b for a, b in zip(again.tensors(), expression.tensors(), strict=True))
    assert torch.equal(again.matrix(), expression.matrix())


@every
def test_the_export_form_has_the_same_matrix(make):
    expression = make()
    form = expression.in_float64().export_form(-1.5)
    assert isinstance(form, ExportForm)
    close(form.matrix(), -1.5 * expression.matrix(), 1e-6)
    rows = rand(len(form.matrix()))
    close(form.rows_scaled(rows).matrix(), rows[:, None] * form.matrix(), 1e-12)
    product = form.as_product()
    assert form.is_dense == (product is None)
    if product is not None:
        close(product.matrix(), form.matrix(), 1e-12)
        assert product.up.shape[1] <= min(form.matrix().shape)


@every
def test_thin_factors_are_the_whole_change(make):
    expression = make()
    factors = expression.thin_factors()
    if factors is not None:
        close(factors.matrix(), expression.matrix(), 1e-12)


ON_THE_BASE = {
    *("replace", "fewer-rows", "more-rows", "more-rows-without-null"),
    *("hadamard", "hadamard-exponential", "column-scaled"),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_changes_that_hold_a_base_weight_depend_on_it(name):
    expected = name in ON_THE_BASE
    assert EXPRESSIONS[name]().depends_on_base == expected
    assert Scaled(EXPRESSIONS[name](), 2.0).depends_on_base == expected
    assert Sum(EXPRESSIONS["replace"](), EXPRESSIONS[name]()).depends_on_base


def test_every_expression_says_its_export_form_and_whether_it_depends_on_the_base():
    for expression in {type(make()) for make in EXPRESSIONS.values()} | {SquareBetween}:
        assert expression.export_form is not Expression.export_form, expression
        holds_a_base_weight = "weight" in expression.__match_args__
        said = [cls for cls in expression.__mro__ if "depends_on_base" in cls.__dict__]
        assert holds_a_base_weight or said[0] is not Expression, expression


def test_an_expression_that_says_neither_is_refused_and_takes_no_file_without_its_base():
    @dataclass(frozen=True)
    class Forgetful(Expression):
        value: torch.Tensor

        def matrix(self):
            return self.value

    with pytest.raises(TypeError, match="Forgetful does not define export_form"):
        Forgetful(rand(6, 8)).export_form()
    assert Forgetful(rand(6, 8)).depends_on_base


CONVOLVING = {"tucker", "tucker-without-kernel", "cored-tucker"}


@pytest.mark.parametrize("name", sorted(EXPRESSIONS.keys() - CONVOLVING))
def test_the_product_equals_a_linear_layer_with_the_matrix(name):
    expression = EXPRESSIONS[name]()
    x = rand(3, 2, 8)
    product = expression.apply(LinearMap(), x, tuple(expression.matrix().shape))
    if product is not None:
        close(product, x @ expression.matrix().T, 1e-12)


CONVOLUTIONS = {
    "low-rank": (lambda groups: low_rank(8, 8 // groups * 6), 2),
    "tucker": (lambda groups: Tucker(rand(8, 2), rand(2, 2, 3, 2), rand(2, 8 // groups)), 2),
    "kron": (lambda groups: Kron(rand(4, 2), low_rank(2, 4 // groups * 6)), 1),
    "hadamard-pair": (lambda groups: LowRankHadamard(low_rank(8, 48, 1), low_rank(8, 48, 1)), 1),
    "feature-sum": (lambda groups: FeatureSum(rand(8), 8 // groups * 6), 2),
    "feature-sum-in-shares": (lambda groups: FeatureSum(rand(8), 8 // groups * 6, 0.25), 2),
}


@pytest.mark.parametrize(
    ("make", "groups"),
    [(make, groups) for make, most in CONVOLUTIONS.values() for groups in range(1, most + 1)],
    ids=[f"{name}-groups-{g}" for name, (_, most) in CONVOLUTIONS.items() for g in range(1, most + 1)],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_product_equals_a_convolution_with_the_matrix(make, groups, stride):
    expression = make(groups)
    x = rand(2, 8, 7, 6)
    layer = ConvMap((stride, 1), (1, 2), (1, 2), groups)
    shape = (8, 8 // groups, 3, 2)
    product = expression.apply(layer, x, shape)
    expected = layer.apply(x, expression.matrix().reshape(shape))
    if product is not None:
        close(product, expected, 1e-12)
    assert product is not None or groups > 1


def test_the_product_is_left_to_the_matrix_where_that_is_cheaper():
    depthwise = ConvMap((1, 1), (1, 1), (1, 1), 8)
    assert low_rank(8, 9, 4).apply(depthwise, rand(1, 8, 5, 5), (8, 1, 3, 3)) is None
    assert (
        Tucker(rand(8, 4), rand(4, 4, 3, 3), rand(4, 1)).apply(depthwise, rand(1, 8, 5, 5), (8, 1, 3, 3))
        is None
    )


def test_an_update_scales_rows_after_adding_and_biases_alike():
    base = rand(2, 3)
    up = rand(2, 1)
    down = rand(1, 3)
    bias = rand(2)
    update = Update(
        LowRank(up, down),
        2.0,
        scale=torch.tensor([3.0, 5.0]).double(),
        bias=torch.tensor([1.0, 1.0]).double(),
        bias_scale=torch.tensor([0.5, -1.0]).double(),
    )
    assert torch.allclose(update.weight(base)[1], 5 * (base[1] + 2 * up[1] * down[0]))
    assert torch.allclose(update.bias_vector(bias), torch.stack([0.5 * (bias[0] + 1), -(bias[1] + 1)]))


def test_an_empty_update_is_the_base_itself():
    base = rand(2, 3, 3, 3)
    assert Update().weight(base) is base
    assert not Update().changes_bias()


def test_a_tucker_matrix_is_the_einsum_of_its_factors():
    up = rand(6, 3)
    core = rand(3, 2, 3, 5)
    down = rand(2, 4)
    expected = torch.einsum("abhw,oa,bi->oihw", core, up, down)
    close(Tucker(up, core, down).matrix().reshape(6, 4, 3, 5), expected, 1e-13)


def test_a_kron_matrix_is_torchs():
    left = rand(2, 3)
    right = low_rank(4, 5)
    close(Kron(left, right).matrix(), torch.kron(left, right.matrix()), 1e-13)


def test_a_small_relative_change_keeps_float32s_accuracy():
    # exp(1e-5) - 1 taken as a difference would be off by 1e-3 of itself
    factor = LowRank(torch.full((1, 1), 1e-5), torch.ones(1, 1))
    change = RelativeChange(torch.full((1, 1), 3.0), factor, exponential=True).matrix().item()
    assert change == pytest.approx(3 * 1.000005e-5, rel=1e-6)
