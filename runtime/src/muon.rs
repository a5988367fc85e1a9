//! Muon: momentum, made orthogonal (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024), with
//! the scale of Liu et al., "Muon is scalable for LLM training", 2025, section 2.2, which lets it share AdamW's learning
//! rate and weight decay.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Root mean square of an update before the learning rate: about AdamW's.
const UPDATE_RMS: f64 = 0.2;
/// Steps of the iteration and its polynomial, as Jordan et al. chose them: singular values end between .7 and 1.2.
const NEWTON_SCHULZ_STEPS: usize = 5;
const NEWTON_SCHULZ: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
/// Keeps a gradient of zeros at zero.
const NORM_EPS: f64 = 1e-7;

/// What an update goes by.
pub(crate) struct Rates<'a> {
    /// A float64 scalar on the device of the matrices.
    pub(crate) lr: &'a Tensor,
    pub(crate) momentum: f64,
    pub(crate) weight_decay: f64,
}

/// One parameter, `[out, in]` or `[experts, out, in]`, with its gradient and its momentum.
pub(crate) struct Matrix {
    pub(crate) param: Tensor,
    pub(crate) grad: Tensor,
    pub(crate) momentum: Tensor,
}

/// Updates matrices of one shape together. Where `is_bad`, a scalar on their device, is true, nothing changes.
///
/// # Errors
/// When libtorch refuses.
pub(crate) fn step(matrices: &mut [Matrix], rates: &Rates<'_>, is_bad: &Tensor) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let stacked =
        |pick: fn(&Matrix) -> &Tensor| Tensor::stack(&matrices.iter().map(pick).collect::<Vec<_>>(), 0);
    let (params, grads, kept) = (stacked(|m| &m.param), stacked(|m| &m.grad), stacked(|m| &m.momentum));
    let moved = kept.f_lerp(&grads, 1.0 - rates.momentum)?;
    let ahead = grads.f_lerp(&moved, rates.momentum)?;
    let shape = ahead.size();
    let (rows, columns) = (shape[shape.len() - 2], shape[shape.len() - 1]);
    let direction = orthogonal(&ahead.reshape([-1, rows, columns])).reshape(&shape);
    let scale = rates.lr * UPDATE_RMS * (rows.max(columns) as f64).sqrt();
    let updated = &params * (1.0 - rates.lr * rates.weight_decay) - direction * scale;
    let updated = params.where_self(is_bad, &updated);
    let moved = kept.where_self(is_bad, &moved);
    for (i, matrix) in matrices.iter_mut().enumerate() {
        matrix.param.f_copy_(&updated.get(i as i64))?;
        matrix.momentum.f_copy_(&moved.get(i as i64))?;
    }
    Ok(())
}

/// `[b, m, n]` with all singular values of each matrix brought near to 1, float32; computed in bf16 on a GPU.
fn orthogonal(x_bmn: &Tensor) -> Tensor {
    let is_tall = x_bmn.size()[1] > x_bmn.size()[2];
    let wide = if is_tall { x_bmn.transpose(1, 2) } else { x_bmn.shallow_clone() };
    let norm = wide.square().sum_dim_intlist([1, 2].as_slice(), true, Kind::Float).sqrt();
    let kind = if x_bmn.device().is_cuda() { Kind::BFloat16 } else { Kind::Float };
    let mut x = (wide / (norm + NORM_EPS)).to_kind(kind);
    let (a, b, c) = NEWTON_SCHULZ;
    for _ in 0..NEWTON_SCHULZ_STEPS {
        let gram = x.bmm(&x.transpose(1, 2));
        let polynomial = gram.baddbmm(&gram, &gram, b, c);
        x = x.baddbmm(&polynomial, &x, a, 1.0);
    }
    let x = x.to_kind(Kind::Float);
    if is_tall { x.transpose(1, 2) } else { x }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn matrix(shape: &[i64]) -> Matrix {
        Matrix {
            param: Tensor::randn(shape, FLOAT),
            grad: Tensor::randn(shape, FLOAT),
            momentum: Tensor::randn(shape, FLOAT),
        }
    }

    fn copy(matrix: &Matrix) -> Matrix {
        let Matrix { param, grad, momentum } = matrix;
        Matrix { param: param.copy(), grad: grad.copy(), momentum: momentum.copy() }
    }

    fn update(matrices: &mut [Matrix], is_bad: bool) {
        let lr = Tensor::from(0.1);
        let rates = Rates { lr: &lr, momentum: 0.9, weight_decay: 0.5 };
        step(matrices, &rates, &Tensor::from(is_bad)).unwrap();
    }

    #[test]
    fn directions_are_nearly_orthogonal_and_keep_the_singular_vectors() {
        tch::manual_seed(1);
        for shape in [[3, 8, 8], [2, 6, 20], [2, 20, 6]] {
            let x = Tensor::randn(shape, FLOAT);
            let direction = orthogonal(&x);
            let (u, _, v) = x.svd(true, true);
            let diagonal = u.transpose(1, 2).bmm(&direction).bmm(&v);
            let singular = diagonal.diagonal(0, 1, 2);
            let (least, most) = (singular.min().double_value(&[]), singular.max().double_value(&[]));
            assert!(least > 0.3 && most < 1.3, "{least} to {most}");
            let off = &diagonal - singular.diag_embed(0, 1, 2);
            assert!(off.abs().max().double_value(&[]) < 1e-3);
        }
    }

    /// The papers' update, written out for one matrix.
    #[test]
    fn matrices_of_one_shape_are_updated_as_each_would_be_alone() {
        tch::manual_seed(2);
        for shape in [vec![4, 10], vec![3, 10, 4]] {
            let mut matrices: Vec<Matrix> = (0..3).map(|_| matrix(&shape)).collect();
            let before: Vec<Matrix> = matrices.iter().map(copy).collect();
            update(&mut matrices, false);
            for (after, before) in matrices.iter().zip(&before) {
                let momentum = &before.momentum * 0.9 + &before.grad * 0.1;
                assert!((&after.momentum - &momentum).abs().max().double_value(&[]) < 1e-6);
                let ahead = &before.grad * 0.1 + &momentum * 0.9;
                let direction = match ahead.dim() {
                    2 => orthogonal(&ahead.unsqueeze(0)).squeeze_dim(0),
                    _ => orthogonal(&ahead),
                };
                let expected = &before.param * 0.95 - direction * (0.1 * 0.2 * 10f64.sqrt());
                assert!((&after.param - expected).abs().max().double_value(&[]) < 1e-5);
            }
        }
    }

    #[test]
    fn a_bad_gradient_changes_nothing() {
        let mut matrices = [matrix(&[4, 6])];
        let before = copy(&matrices[0]);
        let _ = matrices[0].grad.get(0).fill_(f64::NAN);
        update(&mut matrices, true);
        assert_eq!(matrices[0].param, before.param);
        assert_eq!(matrices[0].momentum, before.momentum);
    }
}
