//! Rows of tokens in the order of the experts they go to, and back (the permutation of MegaBlocks, Gale et al. 2022).
//!
//! Legend: `n` tokens, `d` width, `a` choices of a token, `r = a n` rows.

use tch::{Kind, Tensor};

/// Where the chosen rows of tokens stand after they were sorted.
#[derive(Debug)]
pub struct Permutation {
    /// `[r]` places of the rows among the choices `[a, n]`.
    order_r: Tensor,
    /// `[r]` the token of each row.
    tokens_r: Tensor,
    /// `[a, n]` the row of each choice.
    rows_an: Tensor,
}

impl Permutation {
    /// `order_r` are the places of the rows among the choices `[a, n]` of `tokens` tokens, each once.
    pub fn new(order_r: Tensor, tokens: i64) -> Self {
        let rows = Tensor::arange(order_r.numel() as i64, (Kind::Int64, order_r.device()));
        let rows_an = order_r.zeros_like().scatter(0, &order_r, &rows).view([-1, tokens]);
        Self { tokens_r: order_r.remainder(tokens), order_r, rows_an }
    }

    /// `[r]` the token of each row.
    pub fn tokens(&self) -> &Tensor {
        &self.tokens_r
    }

    /// `[r] -> [n, a]`: what rows have, by the choices they are of.
    pub fn choices(&self, x_r: &Tensor) -> Tensor {
        x_r.index_select(0, &self.rows_an.view([-1])).view_as(&self.rows_an).tr()
    }

    /// `[n, a] -> [r]`: what choices have, by the rows that they became.
    pub fn rows(&self, x_na: &Tensor) -> Tensor {
        x_na.tr().flatten(0, 1).index_select(0, &self.order_r)
    }

    /// `[n, d] -> [r, d]`: the token of each row.
    pub fn permute(&self, x_nd: &Tensor) -> Tensor {
        #[cfg(feature = "cuda")]
        if kernels::fits(x_nd) {
            return kernels::permute(self, x_nd);
        }
        x_nd.index_select(0, &self.tokens_r)
    }

    /// `[r, d] -> [n, d]`: the sum of the rows of each token, weighted by `weights_na` `[n, a]`.
    pub fn unpermute(&self, x_rd: &Tensor, weights_na: &Tensor) -> Tensor {
        #[cfg(feature = "cuda")]
        if kernels::fits(x_rd) {
            return kernels::unpermute(self, x_rd, weights_na);
        }
        let weighted_rd = x_rd * self.rows(weights_na).unsqueeze(-1).to_kind(x_rd.kind());
        let (tokens, width) = (weights_na.size()[0], x_rd.size()[1]);
        x_rd.new_zeros([tokens, width], (x_rd.kind(), x_rd.device())).index_add(
            0,
            &self.tokens_r,
            &weighted_rd,
        )
    }
}

/// The calls of `csrc/experts.cpp`.
#[cfg(feature = "cuda")]
mod kernels {
    use tch::Tensor;

    use super::Permutation;
    use crate::ffi;
    use crate::fused::kernels::{VECTOR, is_bf16_on_gpu, made};

    pub(super) fn fits(x: &Tensor) -> bool {
        is_bf16_on_gpu(x) && x.size()[1] % VECTOR == 0
    }

    pub(super) fn permute(permutation: &Permutation, x_nd: &Tensor) -> Tensor {
        let Permutation { tokens_r, rows_an, .. } = permutation;
        // SAFETY: live tensors that libtorch reads; the result is new.
        made(|out| unsafe { ffi::m6_permute(x_nd.as_ptr(), tokens_r.as_ptr(), rows_an.as_ptr(), out) })
    }

    pub(super) fn unpermute(permutation: &Permutation, x_rd: &Tensor, weights_na: &Tensor) -> Tensor {
        let Permutation { order_r, rows_an, .. } = permutation;
        // SAFETY: as above.
        made(|out| unsafe {
            ffi::m6_unpermute(x_rd.as_ptr(), weights_na.as_ptr(), order_r.as_ptr(), rows_an.as_ptr(), out)
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// A permutation of the choices `[a, n]`.
    fn permutation(tokens: i64, choices: i64, device: Device) -> Permutation {
        Permutation::new(Tensor::randperm(tokens * choices, (Kind::Int64, device)), tokens)
    }

    #[test]
    fn a_token_is_the_weighted_sum_of_its_own_rows() {
        tch::manual_seed(1);
        let (tokens, choices) = (5, 3);
        let order = permutation(tokens, choices, Device::Cpu);
        let options = (Kind::Double, Device::Cpu);
        let (x, weights) = (Tensor::randn([tokens, 8], options), Tensor::rand([tokens, choices], options));
        let rows = order.permute(&x);
        let places = Vec::<i64>::try_from(&order.order_r).unwrap();
        for (row, place) in places.into_iter().enumerate() {
            assert_eq!(rows.get(row as i64), x.get(place % tokens));
            assert_eq!(order.rows_an.int64_value(&[place / tokens, place % tokens]), row as i64);
        }
        assert_eq!(order.choices(&rows.select(1, 0)).select(1, 2), x.select(1, 0));
        let factor = weights.sum_dim_intlist([-1].as_slice(), true, Kind::Double);
        let gap = (order.unpermute(&rows, &weights) - x * factor).abs().max().double_value(&[]);
        assert!(gap < 1e-12, "{gap}");
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn kernels_and_their_gradients_match_float64() {
        use crate::fused::testing::{CUDA, check, draw};

        tch::manual_seed(2);
        for (tokens, choices, width) in [(1, 1, 8), (7, 3, 24), (1000, 4, 1024), (129, 8, 2056)] {
            let order = permutation(tokens, choices, CUDA);
            check(
                &[draw(&[tokens, width])],
                |t| order.permute(&t[0]),
                |t| t[0].index_select(0, &order.tokens_r),
            );
            let weights = Tensor::rand([tokens, choices], (Kind::Float, CUDA));
            check(
                &[draw(&[tokens * choices, width]), weights],
                |t| order.unpermute(&t[0], &t[1]),
                |t| {
                    let each = t[0].index_select(0, &order.rows_an.view([-1])).view([choices, tokens, width]);
                    (each * t[1].tr().unsqueeze(-1)).sum_dim_intlist([0].as_slice(), false, Kind::Double)
                },
            );
        }
    }
}
