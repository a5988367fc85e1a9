//! What the tests of kernels share: results and gradients against float64.

use tch::{Device, Kind, Tensor};

pub(crate) const CUDA: Device = Device::Cuda(0);
/// bf16 keeps eight bits.
const BF16_ERROR: f64 = 6e-3;

pub(crate) fn draw(shape: &[i64]) -> Tensor {
    Tensor::randn(shape, (Kind::Float, CUDA)).to_kind(Kind::BFloat16)
}

/// Memory that is handed out next holds no numbers, so that what is not written shows.
fn poison() {
    for megabytes in [1, 8, 64] {
        drop(Tensor::full([megabytes << 18], f64::NAN, (Kind::Float, CUDA)));
    }
}

/// Results and gradients in bf16 against float64; relative errors.
pub(crate) fn check(
    inputs: &[Tensor],
    run: impl Fn(&[Tensor]) -> Tensor,
    reference: impl Fn(&[Tensor]) -> Tensor,
) {
    check_within(BF16_ERROR, inputs, run, reference);
}

pub(crate) fn check_within(
    error: f64,
    inputs: &[Tensor],
    run: impl Fn(&[Tensor]) -> Tensor,
    reference: impl Fn(&[Tensor]) -> Tensor,
) {
    let leaves = |kind: Option<Kind>| -> Vec<Tensor> {
        let leaf = |t: &Tensor| kind.map_or_else(|| t.copy(), |kind| t.to_kind(kind)).set_requires_grad(true);
        inputs.iter().map(leaf).collect()
    };
    let all = |leaves: &[Tensor], y: &Tensor, probe: &Tensor| {
        (y * probe.to_kind(y.kind())).sum(Kind::Float).backward();
        let grads = leaves.iter().map(Tensor::grad);
        std::iter::once(y.shallow_clone()).chain(grads).map(|t| t.to_kind(Kind::Double)).collect::<Vec<_>>()
    };
    let exact_leaves = leaves(Some(Kind::Double));
    let exact = reference(&exact_leaves);
    let probe = draw(&exact.size());
    let exact = all(&exact_leaves, &exact, &probe);
    poison();
    let fast_leaves = leaves(None);
    let fast = all(&fast_leaves, &run(&fast_leaves), &probe);
    for (index, (fast, exact)) in fast.iter().zip(&exact).enumerate() {
        let gap = ((fast - exact).norm() / exact.norm()).double_value(&[]);
        assert!(gap < error, "{index}: {gap}");
    }
}
