//! Dual chunk attention (An et al. 2024, "Training-free long-context scaling of large language models"), with which
//! Qwen2 reads texts beyond its trained length (section 3.2).
//!
//! Legend: `n` tokens of the packed row, `t` tokens of a part, `h` heads, `k` head width.

use tch::{Kind, Tensor};

use crate::attention::{Layout, Span};
use crate::error::{Result, RuntimeError};

/// The queries `[n, h, k]` of one row, turned for keys whose places begin anew in each chunk.
#[derive(Debug)]
pub struct ChunkedQueries {
    /// For keys of their own chunk.
    pub own: Tensor,
    /// For those of the chunk before it.
    pub before: Tensor,
    /// For those of all earlier ones.
    pub earlier: Tensor,
}

/// Causal attention in chunks of `size` tokens: each query meets the keys of its own chunk, of the one before it and of
/// the earlier ones under angles of their own, in one softmax over all of them. `k` and `v` are `[n, g, k]` with `g` key
/// heads, a divisor of `h`; returns `[n, h, k]`, without gradients.
///
/// The three parts of a chunk go through libtorch's attention and are put together by the logarithms of their sums, so
/// memory grows with the length of a text, not with its square.
///
/// # Errors
/// When an example has a prefix that is seen whole, or libtorch refuses a call.
pub fn chunked_attention(
    queries: &ChunkedQueries,
    k: &Tensor,
    v: &Tensor,
    layout: &Layout,
    size: i64,
) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let groups = queries.own.size()[1] / k.size()[1];
    // libtorch's calls that give the sums want a key head for each query head.
    let [k, v] = [k, v].map(|x| x.repeat_interleave_self_int(groups, 1, None));
    let mut outputs = Vec::new();
    let mut start = 0;
    for span in layout.spans() {
        if span.prefix > 1 {
            let Span { prefix, target } = span;
            return Err(RuntimeError::Torch(format!(
                "an example of {prefix} + {target} tokens: chunks of {size} are for texts without a prefix"
            )));
        }
        for first in (0..span.len()).step_by(size as usize) {
            let rows = (start + first, size.min(span.len() - first));
            let before = (start + (first - size).max(0), size.min(first));
            let earlier = (start, (first - size).max(0));
            let parts = [
                (&queries.own, rows, true),
                (&queries.before, before, false),
                (&queries.earlier, earlier, false),
            ];
            let parts = parts.into_iter().filter(|(_, (_, keys), _)| *keys > 0);
            let parts = parts.map(|(q, keys, is_causal)| Part::new(q, rows, [&k, &v], keys, is_causal));
            outputs.push(together(&parts.collect::<Result<Vec<_>>>()?).to_kind(v.kind()));
        }
        start += span.len();
    }
    Ok(Tensor::cat(&outputs, 0))
}

/// What queries make of some of their keys.
struct Part {
    /// `[h, t, k]`, normalised over these keys.
    out: Tensor,
    /// `[h, t]` logarithms of the sums of exponentials.
    log_sums: Tensor,
}

impl Part {
    /// Of the queries in `rows` and the keys in `keys`, both a first row and a number of rows.
    fn new(
        q: &Tensor,
        rows: (i64, i64),
        kv: [&Tensor; 2],
        keys: (i64, i64),
        is_causal: bool,
    ) -> Result<Self> {
        let some = |x: &Tensor, (first, count)| x.narrow(0, first, count).transpose(0, 1).unsqueeze(0); // [1, h, t, k]
        let (q, [k, v]) = (some(q, rows), kv.map(|x| some(x, keys)));
        let none = None::<&Tensor>;
        let (out, log_sums) = if q.device().is_cuda() {
            let (out, log_sums, ..) = Tensor::f_internal_scaled_dot_product_efficient_attention(
                &q, &k, &v, none, true, 0.0, is_causal, None,
            )?;
            (out, log_sums)
        } else {
            Tensor::f_internal_scaled_dot_product_flash_attention_for_cpu(
                &q, &k, &v, 0.0, is_causal, none, None,
            )?
        };
        // On a GPU the sums are padded.
        Ok(Self { out: out.squeeze_dim(0), log_sums: log_sums.squeeze_dim(0).narrow(1, 0, rows.1) })
    }
}

/// `[t, h, k]` float32, what the keys of all parts come to together.
fn together(parts: &[Part]) -> Tensor {
    let log_sums: Vec<_> = parts.iter().map(|part| &part.log_sums).collect();
    let total = Tensor::stack(&log_sums, 0).logsumexp([0].as_slice(), false);
    let weighted = parts.iter().map(|Part { out, log_sums }| out * (log_sums - &total).exp().unsqueeze(-1));
    weighted.sum::<Tensor>().to_kind(Kind::Float).transpose(0, 1)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// The rule written out: one softmax over scores that each pair of chunks has its own queries for.
    fn by_definition(queries: &ChunkedQueries, k: &Tensor, v: &Tensor, spans: &[Span], size: i64) -> Tensor {
        let heads = |x: &Tensor| x.to_kind(Kind::Double).transpose(0, 1);
        let groups = queries.own.size()[1] / k.size()[1];
        let [k, v] = [k, v].map(|x| heads(&x.repeat_interleave_self_int(groups, 1, None)));
        let scale = (k.size()[2] as f64).sqrt();
        let scores = |q: &Tensor| heads(q).matmul(&k.transpose(1, 2)) / scale;
        let [own, before, earlier] = [&queries.own, &queries.before, &queries.earlier].map(scores);
        let mixed = own.full_like(f64::NEG_INFINITY);
        let mut start = 0;
        for span in spans {
            for row in 0..span.len() {
                for column in 0..=row {
                    let from = match row / size - column / size {
                        0 => &own,
                        1 => &before,
                        _ => &earlier,
                    };
                    let at = |x: &Tensor| x.narrow(1, start + row, 1).narrow(2, start + column, 1);
                    at(&mixed).copy_(&at(from));
                }
            }
            start += span.len();
        }
        mixed.softmax(-1, Kind::Double).matmul(&v).transpose(0, 1)
    }

    fn compare(device: Device, kind: Kind, error: f64) {
        tch::manual_seed(7);
        let spans: Vec<Span> = [1, 4, 5, 17, 8, 0, 9].map(|target| Span { prefix: 0, target }).to_vec();
        let n = spans.iter().map(Span::len).sum::<i64>();
        let draw = |heads: i64| Tensor::randn([n, heads, 8], (Kind::Float, device)).to_kind(kind);
        let queries = ChunkedQueries { own: draw(6), before: draw(6), earlier: draw(6) };
        let (k, v) = (draw(2), draw(2));
        let layout = Layout::new(spans.clone(), device).unwrap();
        for size in [1, 4, 7, 32] {
            let out = chunked_attention(&queries, &k, &v, &layout, size).unwrap();
            assert_eq!(out.kind(), kind);
            let exact = by_definition(&queries, &k, &v, &spans, size);
            let gap = ((out - &exact).norm() / exact.norm()).double_value(&[]);
            assert!(gap < error, "{size}: {gap}");
        }
    }

    #[test]
    fn matches_the_definition() {
        compare(Device::Cpu, Kind::Float, 1e-6);
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn matches_the_definition_on_a_gpu() {
        compare(Device::Cuda(0), Kind::Float, 1e-5);
        compare(Device::Cuda(0), Kind::BFloat16, 1e-2);
    }

    #[test]
    fn examples_with_a_prefix_are_refused() {
        let x = Tensor::zeros([9, 2, 8], (Kind::Float, Device::Cpu));
        let queries =
            ChunkedQueries { own: x.shallow_clone(), before: x.shallow_clone(), earlier: x.shallow_clone() };
        let layout = Layout::new(vec![Span { prefix: 4, target: 5 }], Device::Cpu).unwrap();
        let error = chunked_attention(&queries, &x, &x, &layout, 8).unwrap_err().to_string();
        assert!(error.contains("an example of 4 + 5 tokens: chunks of 8"), "{error}");
    }
}
