//! Prefix/target attention over packed examples, by sequence lengths.
//!
//! One rule covers every task (design: "How data flows"): prefix tokens of an example see its whole prefix,
//! target tokens see the prefix and the targets up to themselves. In legends: `n` tokens of the packed row,
//! `h` heads, `k` head width.

use tch::{Device, Kind, Tensor};

use crate::device::upload;
use crate::error::{Result, RuntimeError};
use crate::ffi;
use crate::fused::split_rotate;

/// The lengths of one packed example: `prefix` tokens first, then `target` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Tokens that see the whole prefix.
    pub prefix: i64,
    /// Tokens that see the prefix and earlier targets.
    pub target: i64,
}

impl Span {
    /// All tokens of the example.
    pub fn len(&self) -> i64 {
        self.prefix + self.target
    }

    /// Whether the example has no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Below it cuDNN's attention is not faster than flash: with a key head for each query head, and with fewer.
const SHORTEST_DENSE: i64 = 256;
const SHORTEST_DENSE_GROUPED: i64 = 1024;
/// cuDNN takes a tenth of a second for a plan at each length that it did not meet before, so it gets round ones alone.
const DENSE_STEP: i64 = 64;

/// Where the examples of a packed row begin and end, ready for a device.
#[derive(Debug)]
pub struct Layout {
    spans: Vec<Span>,
    longest: i64,
    flash: Option<FlashLayout>,
}

/// Index tensors of the variable-length calls, made once a batch.
#[derive(Debug)]
struct FlashLayout {
    /// Whole examples.
    examples: Stretches,
    longest: i64,
    /// The prefix of each example.
    #[cfg(feature = "cuda")]
    prefixes: Tensor,
    /// The two calls of examples with a prefix; absent where causal is right for all.
    halves: Option<Halves>,
    /// The length of the examples where all have the same, a round one, and causal is right for all.
    common: Option<i64>,
}

/// Prefixes and targets apart, where they lie. Each call gives the rows of the other no key, whose results are zeros then,
/// and looks at each key once, with or without a query, so that gradients are whole.
#[derive(Debug)]
struct Halves {
    prefixes: Stretches,
    targets: Stretches,
}

/// Where the stretches of a variable-length call end, `[stretches + 1]` int32 from 0: queries, and the keys that they see.
#[derive(Debug)]
struct Stretches {
    query_ends: Tensor,
    key_ends: Tensor,
}

impl Stretches {
    /// Of stretches of so many queries and keys, one after the other.
    fn new(lengths: impl Iterator<Item = (i64, i64)>, device: Device) -> Result<Self> {
        let (mut query_ends, mut key_ends) = (vec![0i32], vec![0i32]);
        let (mut query_end, mut key_end) = (0, 0);
        for (queries, keys) in lengths {
            (query_end, key_end) = (query_end + queries as i32, key_end + keys as i32);
            query_ends.push(query_end);
            key_ends.push(key_end);
        }
        let ends = |ends: &[i32]| upload(&Tensor::from_slice(ends), device);
        let is_same = query_ends == key_ends;
        let query_ends = ends(&query_ends)?;
        let key_ends = if is_same { query_ends.shallow_clone() } else { ends(&key_ends)? };
        Ok(Self { query_ends, key_ends })
    }
}

impl Layout {
    /// A layout of these examples in this order. Copies a few small index tensors where `device` is a GPU.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub fn new(spans: Vec<Span>, device: Device) -> Result<Self> {
        let longest = spans.iter().map(Span::len).max().unwrap_or(0);
        let flash = if device.is_cuda() { Some(FlashLayout::new(&spans, longest, device)?) } else { None };
        Ok(Self { spans, longest, flash })
    }

    /// The examples.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Tokens of the longest example.
    pub fn longest(&self) -> i64 {
        self.longest
    }
}

impl FlashLayout {
    fn new(spans: &[Span], longest: i64, device: Device) -> Result<Self> {
        // For a prefix of one token or none causal is already right.
        let is_causal = spans.iter().all(|span| span.prefix <= 1);
        let prefixes = |span: &Span| [(span.prefix, span.prefix), (span.target, 0), (0, span.target)];
        let targets = |span: &Span| [(span.prefix, 0), (span.target, span.len())];
        let halves = || {
            Ok::<_, RuntimeError>(Halves {
                prefixes: Stretches::new(spans.iter().flat_map(prefixes), device)?,
                targets: Stretches::new(spans.iter().flat_map(targets), device)?,
            })
        };
        Ok(Self {
            examples: Stretches::new(spans.iter().map(|span| (span.len(), span.len())), device)?,
            longest,
            #[cfg(feature = "cuda")]
            prefixes: upload(
                &Tensor::from_slice(&spans.iter().map(|span| span.prefix as i32).collect::<Vec<_>>()),
                device,
            )?,
            halves: if is_causal { None } else { Some(halves()?) },
            common: (is_causal
                && longest % DENSE_STEP == 0
                && spans.iter().all(|span| span.len() == longest))
            .then_some(longest),
        })
    }
}

/// Attention of `q`, `k`, `v` of shape `[n, h, k]` (fewer key heads than query heads are allowed: grouped
/// queries) under the prefix/target rule of `layout`; returns `[n, h, k]`. With a `window`, a token sees of what is
/// before it only so many tokens, itself included.
///
/// On a GPU and in bf16 this is, for short examples, a kernel of our own; or two variable-length flash calls where the rows
/// lie, of prefixes and of targets; or, where causal is right for all, one, and where then all examples have one round length,
/// one of cuDNN's, which is faster. Elsewhere it is a masked call for each example.
///
/// # Errors
/// When libtorch refuses a call.
pub fn prefix_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &Layout,
    window: Option<i64>,
) -> Result<Tensor> {
    match &layout.flash {
        Some(flash) if q.kind() == Kind::BFloat16 => flash_attention(q, k, v, flash, window),
        _ => Ok(masked_attention(q, k, v, &layout.spans, window)),
    }
}

/// [`prefix_attention`] of `heads` queries, and `kv_heads` keys and values, side by side in `qkv` `[n, h + 2 g, k]`, the
/// first two turned as by [`crate::fused::rotate`]; on a GPU short examples are turned as they are read.
///
/// # Errors
/// When libtorch refuses a call.
pub fn rotary_attention(
    qkv: &Tensor,
    (heads, kv_heads): (i64, i64),
    (cosines, sines): (&Tensor, &Tensor),
    layout: &Layout,
    window: Option<i64>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(flash) = &layout.flash
        && heads == kv_heads
        && short::fits(qkv, qkv.size()[1], flash, window)
    {
        return short::rotary_attention(qkv, cosines, sines, flash);
    }
    let (q, k, v) = split_rotate(qkv, heads, kv_heads, cosines, sines);
    prefix_attention(&q, &k, &v, layout, window)
}

fn flash_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &FlashLayout,
    window: Option<i64>,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if short::fits(q, k.size()[1], layout, window) {
        return short::attention(q, k, v, layout);
    }
    let shortest = if q.size()[1] == k.size()[1] { SHORTEST_DENSE } else { SHORTEST_DENSE_GROUPED };
    let is_fast = |length: &i64| *length >= shortest && window.is_none() && is_dense(q);
    if let Some(length) = layout.common.filter(is_fast) {
        return causal_attention(q, k, v, length);
    }
    let call = |stretches, causal| varlen_flash(q, k, v, stretches, layout.longest, causal, window);
    match &layout.halves {
        None => call(&layout.examples, true),
        Some(Halves { prefixes, targets }) => Ok(call(prefixes, false)? + call(targets, true)?),
    }
}

/// Whether cuDNN's attention may be taken: its backward pass is not the same from run to run, and knows no wider heads.
fn is_dense(q: &Tensor) -> bool {
    const MAX_HEAD_WIDTH: i64 = 128;
    // SAFETY: reads a flag.
    q.size()[2] <= MAX_HEAD_WIDTH && !unsafe { ffi::m6_is_deterministic() }
}

/// Causal attention in examples of `length` tokens each, by cuDNN.
fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, length: i64) -> Result<Tensor> {
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors that libtorch reads; `out` receives a new one on success.
    ffi::check(unsafe { ffi::m6_causal_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), length, &mut out) })?;
    Ok(ffi::take(out))
}

fn varlen_flash(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    stretches: &Stretches,
    longest: i64,
    causal: bool,
    window: Option<i64>,
) -> Result<Tensor> {
    const UNLIMITED: i64 = -1;
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors that libtorch reads; `out` receives a new one on success.
    ffi::check(unsafe {
        ffi::m6_varlen_flash(
            q.as_ptr(),
            k.as_ptr(),
            v.as_ptr(),
            stretches.query_ends.as_ptr(),
            stretches.key_ends.as_ptr(),
            longest,
            longest,
            causal,
            window.map_or(UNLIMITED, |size| size - 1),
            &mut out,
        )
    })?;
    Ok(ffi::take(out))
}

/// The calls of `csrc/short_attention.cpp`.
#[cfg(feature = "cuda")]
mod short {
    use tch::Tensor;

    use super::FlashLayout;
    use crate::error::Result;
    use crate::ffi;
    use crate::fused::kernels::{is_bf16_on_gpu, try_made};

    const HEAD_WIDTH: i64 = 64;

    /// Whether heads `x` `[n, h, k]` and `key_heads` of keys are what the kernels are for.
    pub(super) fn fits(x: &Tensor, key_heads: i64, layout: &FlashLayout, window: Option<i64>) -> bool {
        is_bf16_on_gpu(x)
            && x.size()[1..] == [key_heads, HEAD_WIDTH]
            && layout.longest <= longest()
            && window.is_none_or(|size| size >= layout.longest)
    }

    /// Tokens of an example that fit into the shared memory of a block: 352 on Hopper.
    fn longest() -> i64 {
        // SAFETY: reads an attribute of the device that a tensor is on.
        unsafe { ffi::m6_short_attention_longest() }
    }

    pub(super) fn attention(q: &Tensor, k: &Tensor, v: &Tensor, layout: &FlashLayout) -> Result<Tensor> {
        let FlashLayout { examples, prefixes, longest, .. } = layout;
        // SAFETY: live tensors that libtorch reads; the result is new.
        try_made(|out| unsafe {
            let (starts, prefixes) = (examples.query_ends.as_ptr(), prefixes.as_ptr());
            ffi::m6_short_attention(q.as_ptr(), k.as_ptr(), v.as_ptr(), starts, prefixes, *longest, out)
        })
    }

    pub(super) fn rotary_attention(
        qkv: &Tensor,
        cosines: &Tensor,
        sines: &Tensor,
        layout: &FlashLayout,
    ) -> Result<Tensor> {
        let FlashLayout { examples, prefixes, longest, .. } = layout;
        let (cosines, sines) = (cosines.contiguous(), sines.contiguous());
        // SAFETY: as above.
        try_made(|out| unsafe {
            let (starts, prefixes) = (examples.query_ends.as_ptr(), prefixes.as_ptr());
            let (cosines, sines) = (cosines.as_ptr(), sines.as_ptr());
            ffi::m6_short_rotary_attention(qkv.as_ptr(), cosines, sines, starts, prefixes, *longest, out)
        })
    }
}

/// The reference: one masked call for each example.
fn masked_attention(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], window: Option<i64>) -> Tensor {
    let mut outputs = Vec::with_capacity(spans.len());
    let mut start = 0;
    for span in spans.iter().filter(|span| !span.is_empty()) {
        let example = |t: &Tensor| t.narrow(0, start, span.len()).transpose(0, 1).unsqueeze(0); // [1, h, t, k]
        let window = window.filter(|size| *size < span.len());
        let mask = (span.prefix > 1 || window.is_some()).then(|| span_mask(*span, window, q.device()));
        let out = Tensor::scaled_dot_product_attention(
            &example(q),
            &example(k),
            &example(v),
            mask.as_ref(),
            0.0,
            mask.is_none(),
            None,
            true,
        );
        outputs.push(out.squeeze_dim(0).transpose(0, 1)); // [t, h, k]
        start += span.len();
    }
    Tensor::cat(&outputs, 0)
}

/// `[t, t]`, true where a query (row) may look at a key (column).
fn span_mask(span: Span, window: Option<i64>, device: Device) -> Tensor {
    let all = Tensor::ones([span.len(), span.len()], (Kind::Bool, device));
    let mask = all.tril(0);
    let _ = mask.narrow(0, 0, span.prefix).narrow(1, 0, span.prefix).fill_(1);
    match window {
        Some(size) => mask.logical_and(&all.triu(1 - size)),
        None => mask,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// The rule, written out token by token in f64.
    fn by_definition(q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span], window: Option<i64>) -> Tensor {
        let n = q.size()[0];
        let allowed = Tensor::zeros([n, n], (Kind::Bool, Device::Cpu));
        let mut start = 0;
        for span in spans {
            for row in 0..span.len() {
                for column in 0..span.len() {
                    let prefix_pair = row < span.prefix && column < span.prefix;
                    let is_near = window.is_none_or(|size| row - column < size);
                    if is_near && (prefix_pair || column <= row) {
                        let _ = allowed.get(start + row).get(start + column).fill_(1);
                    }
                }
            }
            start += span.len();
        }
        let [q, k, v] = [q, k, v].map(|t| t.to_kind(Kind::Double).transpose(0, 1));
        let scores = q.matmul(&k.transpose(1, 2)) / (q.size()[2] as f64).sqrt();
        let scores = scores.masked_fill(&allowed.logical_not(), f64::NEG_INFINITY);
        scores.softmax(-1, Kind::Double).matmul(&v).transpose(0, 1)
    }

    fn spans() -> Vec<Span> {
        [(3, 5), (0, 4), (6, 0), (1, 1), (0, 1), (2, 7)]
            .map(|(prefix, target)| Span { prefix, target })
            .to_vec()
    }

    /// Examples of any kind: without a prefix, without a target, empty ones, and rows of padding at the end.
    fn any_spans() -> impl Strategy<Value = Vec<Span>> {
        let example = prop_oneof![
            (0i64..9, 0i64..9),
            (0i64..9).prop_map(|prefix| (prefix, 0)),
            (0i64..9).prop_map(|target| (0, target)),
        ];
        let spans = proptest::collection::vec(example, 1..7);
        (spans, 1i64..20).prop_map(|(spans, padding)| {
            let all = spans.into_iter().chain([(0, padding)]);
            all.map(|(prefix, target)| Span { prefix, target }).collect()
        })
    }

    proptest! {
        #[test]
        fn matches_the_definition_on_any_examples_gradients_included(
            spans in any_spans(),
            window in proptest::option::of(1i64..12),
            key_heads in prop_oneof![Just(1i64), Just(2), Just(4)],
            seed: i64,
        ) {
            const HEADS: i64 = 4;
            tch::manual_seed(seed);
            let n = spans.iter().map(Span::len).sum::<i64>();
            let leaves = [HEADS, key_heads, key_heads]
                .map(|heads| Tensor::randn([n, heads, 8], FLOAT).set_requires_grad(true));
            let probe = Tensor::randn([n, HEADS, 8], FLOAT);
            let layout = Layout::new(spans.clone(), Device::Cpu).unwrap();
            let [q, k, v] = &leaves;
            let out = prefix_attention(q, k, v, &layout, window).unwrap();
            let [k, v] = [k, v].map(|t| t.repeat_interleave_self_int(HEADS / key_heads, 1, None));
            let exact = by_definition(q, &k, &v, &spans, window);
            let gap = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
            prop_assert!(gap(&out, &exact) < 1e-5);
            let gradients = |y: &Tensor| {
                Tensor::run_backward(&[(y * &probe).sum(Kind::Double)], &leaves, true, false)
            };
            for (ours, exact) in gradients(&out).iter().zip(gradients(&exact)) {
                prop_assert!(gap(ours, &exact) < 1e-4);
            }
        }
    }

    #[test]
    fn a_key_head_serves_its_group_of_query_heads() {
        tch::manual_seed(4);
        let spans = spans();
        let n = spans.iter().map(Span::len).sum::<i64>();
        let q = Tensor::randn([n, 6, 8], FLOAT);
        let [k, v] = [0; 2].map(|_| Tensor::randn([n, 2, 8], FLOAT));
        let layout = Layout::new(spans, Device::Cpu).unwrap();
        let few = prefix_attention(&q, &k, &v, &layout, Some(4)).unwrap();
        let [k, v] = [k, v].map(|t| t.repeat_interleave_self_int(3, 1, None));
        let many = prefix_attention(&q, &k, &v, &layout, Some(4)).unwrap();
        assert!((few - many).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn later_targets_and_other_examples_do_not_leak() {
        tch::manual_seed(2);
        let spans = spans();
        let n = spans.iter().map(Span::len).sum::<i64>();
        let [q, k, v] = [0; 3].map(|_| Tensor::randn([n, 2, 8], FLOAT));
        let layout = Layout::new(spans, Device::Cpu).unwrap();
        let before = prefix_attention(&q, &k, &v, &layout, None).unwrap();
        // Token 5 is the third target of the first example: only targets after it may change.
        let _ = v.get(5).fill_(9.0);
        let after = prefix_attention(&q, &k, &v, &layout, None).unwrap();
        let changed = (before - after).abs().sum_dim_intlist([1, 2].as_slice(), false, Kind::Float);
        let changed: Vec<f32> = Vec::try_from(changed).unwrap();
        for (token, change) in changed.iter().enumerate() {
            assert_eq!(*change > 0.0, (5..8).contains(&token), "token {token}: {change}");
        }
    }

    /// The fast calls in bf16 against the reference, with query heads, key heads and their width.
    #[cfg(feature = "cuda")]
    #[track_caller]
    fn compare([heads, key_heads, width]: [i64; 3], window: Option<i64>, spans: &[Span]) {
        /// bf16 keeps eight bits.
        const BF16_ERROR: f64 = 1e-2;
        let n = spans.iter().map(Span::len).sum::<i64>();
        let draw = |heads: i64| Tensor::randn([n, heads, width], FLOAT).to_kind(Kind::BFloat16);
        let [q, k, v] = [heads, key_heads, key_heads].map(draw);
        let probe = draw(heads);
        let run = |device: Device, kind: Kind| {
            let leaves = [&q, &k, &v].map(|t| t.to_device(device).to_kind(kind).set_requires_grad(true));
            let [q, k, v] = &leaves;
            let layout = Layout::new(spans.to_vec(), device).unwrap();
            let out = prefix_attention(q, k, v, &layout, window).unwrap();
            (&out * probe.to_device(device).to_kind(kind)).sum(Kind::Float).backward();
            let host = |t: Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double);
            [host(out), host(q.grad()), host(k.grad()), host(v.grad())]
        };
        let exact = run(Device::Cpu, Kind::Float);
        for (fast, exact) in run(Device::Cuda(0), Kind::BFloat16).iter().zip(&exact) {
            let gap = ((fast - exact).norm() / exact.norm()).double_value(&[]);
            assert!(gap < BF16_ERROR, "{heads} {key_heads} {width} {window:?} {spans:?}: {gap}");
        }
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn fast_calls_match_the_definition_gradients_included() {
        tch::manual_seed(3);
        let mut spans = spans();
        spans.extend((0..20).map(|i| Span { prefix: (i * 7) % 65, target: 1 + (i * 31) % 257 }));
        let common = [Span { prefix: 1, target: 1023 }, Span { prefix: 0, target: 1024 }];
        let long = [Span { prefix: 300, target: 100 }, Span { prefix: 3, target: 20 }];
        let full = [Span { prefix: 100, target: 252 }, Span { prefix: 352, target: 0 }];
        for (key_heads, window) in [(6, None), (6, Some(24)), (6, Some(400)), (2, None), (2, Some(24))] {
            for spans in [spans.as_slice(), &common, &long, &full] {
                compare([6, key_heads, 64], window, spans);
            }
        }
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn fast_calls_match_the_definition_for_any_examples_and_head_widths() {
        use proptest::strategy::ValueTree;
        use proptest::test_runner::TestRunner;
        let mut runner = TestRunner::deterministic();
        let longer = (0i64..300, 0i64..300).prop_map(|(prefix, target)| Span { prefix, target });
        for width in [32, 64, 128] {
            for (heads, key_heads, window) in [(4, 4, None), (4, 2, None), (4, 4, Some(50)), (6, 1, Some(7))]
            {
                let mut spans = any_spans().new_tree(&mut runner).unwrap().current();
                spans.extend(
                    proptest::collection::vec(longer.clone(), 3).new_tree(&mut runner).unwrap().current(),
                );
                compare([heads, key_heads, width], window, &spans);
            }
        }
    }

    /// Needs a GPU; run with `cargo test --features cuda`.
    #[cfg(feature = "cuda")]
    #[test]
    fn heads_that_are_turned_as_they_are_read_match_those_turned_before() {
        tch::manual_seed(5);
        const HEADS: i64 = 5;
        let spans =
            spans().into_iter().chain([Span { prefix: 20, target: 230 }, Span { prefix: 0, target: 77 }]);
        let spans: Vec<Span> = spans.collect();
        let n = spans.iter().map(Span::len).sum::<i64>();
        let angles = Tensor::randn([n, 1, 32], FLOAT);
        let angles = Tensor::cat(&[&angles, &angles], -1);
        let draw = |heads: i64| Tensor::randn([n, heads, 64], FLOAT).to_kind(Kind::BFloat16);
        let (qkv, probe) = (draw(3 * HEADS), draw(HEADS));
        let run = |device: Device, kind: Kind| {
            let leaf = qkv.to_device(device).to_kind(kind).set_requires_grad(true);
            let layout = Layout::new(spans.clone(), device).unwrap();
            let turns = [angles.cos() * 1.5, angles.sin() * 1.5].map(|turn| turn.to_device(device));
            let out = rotary_attention(&leaf, (HEADS, HEADS), (&turns[0], &turns[1]), &layout, None).unwrap();
            (&out * probe.to_device(device).to_kind(kind)).sum(Kind::Float).backward();
            [out, leaf.grad()].map(|t| t.to_device(Device::Cpu).to_kind(Kind::Double))
        };
        let exact = run(Device::Cpu, Kind::Float);
        for (fast, exact) in run(Device::Cuda(0), Kind::BFloat16).iter().zip(&exact) {
            let gap = ((fast - exact).norm() / exact.norm()).double_value(&[]);
            assert!(gap < 1e-2, "{gap}");
        }
    }
}
