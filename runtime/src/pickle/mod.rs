//! The pickles of PyTorch's weight files, read without running anything.
//!
//! A pickle is a program for a stack machine that may import and call any function. Here the few calls that make up
//! state dicts are understood, and whatever else a training framework has put beside the weights becomes
//! [`Value::Opaque`]. Opcodes are those of Python's `pickletools`, protocols 2 to 5; PyTorch writes 2.

mod machine;

use machine::Machine;

/// Why a pickle cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("byte {at} of the pickle: {reason}")]
pub struct PickleError {
    at: usize,
    reason: String,
}

type Result<T> = std::result::Result<T, PickleError>;

/// Place of a value in its pickle. Values refer to each other by it, since they may be shared and form circles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(usize);

/// What a pickle holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `None`, a truth value or a fraction: nothing that weights depend on.
    Plain,
    /// An integer of up to 64 bits.
    Int(i64),
    /// A string.
    Text(String),
    /// A tuple or a list.
    Sequence(Vec<Id>),
    /// A dict or an `OrderedDict`, in the order of insertion.
    Dict(Vec<(Id, Id)>),
    /// A function or class by its full name; it is not looked for.
    Global(String),
    /// A storage, which lies in a file of its own.
    Storage(Storage),
    /// A tensor.
    Tensor(StridedTensor),
    /// What came from a function or class that is not called, by its name.
    Opaque(String),
}

/// The dtype of a storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// float64
    F64,
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    Bf16,
    /// int64
    I64,
    /// int32
    I32,
    /// int16
    I16,
    /// uint8
    U8,
    /// bool
    Bool,
}

/// Numbers in a file of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    /// What the numbers are.
    pub element: Element,
    /// Name of the file.
    pub key: String,
    /// How many there are.
    pub len: u64,
}

/// A tensor as a view of a storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StridedTensor {
    /// Where the numbers are.
    pub storage: Storage,
    /// Index of the first.
    pub offset: u64,
    /// Length of each axis.
    pub shape: Vec<u64>,
    /// Numbers from one place of an axis to the next.
    pub strides: Vec<u64>,
}

impl Element {
    fn of_storage_class(name: &str) -> Option<Self> {
        Some(match name.strip_prefix("torch.")? {
            "DoubleStorage" => Self::F64,
            "FloatStorage" => Self::F32,
            "HalfStorage" => Self::F16,
            "BFloat16Storage" => Self::Bf16,
            "LongStorage" => Self::I64,
            "IntStorage" => Self::I32,
            "ShortStorage" => Self::I16,
            "ByteStorage" => Self::U8,
            "BoolStorage" => Self::Bool,
            _ => return None,
        })
    }
}

impl StridedTensor {
    /// How many numbers of the storage, counted from `offset`, the tensor spans; `None` where it leaves its storage or
    /// repeats numbers, as no weight does.
    #[must_use]
    pub fn span(&self) -> Option<u64> {
        if self.shape.len() != self.strides.len() {
            return None;
        }
        let numel = self.shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n))?;
        let mut span = u64::from(numel > 0);
        if numel > 0 {
            for (&n, &stride) in self.shape.iter().zip(&self.strides) {
                span = span.checked_add((n - 1).checked_mul(stride)?)?;
            }
        }
        (numel <= span && self.offset.checked_add(span)? <= self.storage.len).then_some(span)
    }
}

/// The values of a pickle.
#[derive(Debug)]
pub struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads a pickle.
    ///
    /// # Errors
    /// When the bytes are no pickle of protocols 2 to 5.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let (values, root) = Machine::new(bytes).run()?;
        Ok(Self { values, root })
    }

    /// What the pickle is of.
    #[must_use]
    pub fn root(&self) -> &Value {
        self.get(self.root)
    }

    /// The value at `id`, which this pickle gave.
    #[must_use]
    pub fn get(&self, id: Id) -> &Value {
        &self.values[id.0]
    }

    /// The members of a dict whose keys are strings, in order; none for other values.
    pub fn members<'a>(&'a self, dict: &'a Value) -> impl Iterator<Item = (&'a str, &'a Value)> {
        let pairs = if let Value::Dict(pairs) = dict { pairs.as_slice() } else { &[] };
        pairs.iter().filter_map(|&(key, value)| match self.get(key) {
            Value::Text(key) => Some((key.as_str(), self.get(value))),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(bytes: &[u8]) -> Pickle {
        Pickle::parse(bytes).unwrap()
    }

    /// `GLOBAL`, which a class or function is named by.
    fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }

    /// The pickle of `_rebuild_tensor_v2(storage, 0, (2, 3), (3, 1), False, OrderedDict())`, where the storage "0"
    /// has 6 numbers and is of `class`.
    fn tensor(class: &str) -> Vec<u8> {
        let storage = [
            b"(X\x07\0\0\0storage".as_slice(),
            &global("torch", class),
            b"X\x01\0\0\x000X\x03\0\0\0cpuK\x06tQ",
        ];
        [
            global("torch._utils", "_rebuild_tensor_v2"),
            b"(".to_vec(),
            storage.concat(),
            b"K\0K\x02K\x03\x86K\x03K\x01\x86\x89".to_vec(),
            global("collections", "OrderedDict"),
            b")RtR".to_vec(),
        ]
        .concat()
    }

    #[test]
    fn plain_values_and_shared_ones() {
        // {"a": [1, -2, 70000], "b": the same list}
        let pickle =
            parse(b"\x80\x02}(X\x01\0\0\0a]q\x01(K\x01J\xfe\xff\xff\xffJp\x11\x01\0eX\x01\0\0\0bh\x01u.");
        let members: Vec<_> = pickle.members(pickle.root()).collect();
        assert_eq!((members[0].0, members[1].0), ("a", "b"));
        assert_eq!(members[0].1, members[1].1);
        let Value::Sequence(items) = members[0].1 else { panic!("{members:?}") };
        let numbers: Vec<_> = items.iter().map(|&id| pickle.get(id).clone()).collect();
        assert_eq!(numbers, [Value::Int(1), Value::Int(-2), Value::Int(70_000)]);
    }

    #[test]
    fn integers_of_any_size() {
        assert_eq!(parse(b"\x8a\x02\x00\xff.").root(), &Value::Int(-256));
        assert_eq!(parse(b"\x8a\x00.").root(), &Value::Int(0));
        assert!(matches!(parse(b"\x8a\x09\0\0\0\0\0\0\0\0\x01.").root(), Value::Opaque(_)));
    }

    #[test]
    fn a_tensor_is_a_view_of_its_storage() {
        let pickle = parse(&[tensor("HalfStorage"), b".".to_vec()].concat());
        let storage = Storage { element: Element::F16, key: "0".into(), len: 6 };
        let expected = StridedTensor { storage, offset: 0, shape: vec![2, 3], strides: vec![3, 1] };
        assert_eq!(expected.span(), Some(6));
        assert_eq!(pickle.root(), &Value::Tensor(expected));
    }

    #[test]
    fn other_calls_are_named_and_not_made() {
        let call = [global("os", "system"), b"X\x04\0\0\0exit\x85R}X\x01\0\0\0kK\x01sb.".to_vec()].concat();
        assert_eq!(parse(&call).root(), &Value::Opaque("os.system".into()));
        let instance = [global("a", "B"), b")\x81}(K\x01K\x02ub.".to_vec()].concat();
        assert_eq!(parse(&instance).root(), &Value::Opaque("a.B".into()));
        let unknown = [tensor("ComplexFloatStorage"), b".".to_vec()].concat();
        assert_eq!(parse(&unknown).root(), &Value::Opaque("torch._utils._rebuild_tensor_v2".into()));
    }

    #[test]
    fn tensors_stay_in_their_storage() {
        let span = |offset, shape: &[u64], strides: &[u64]| {
            let storage = Storage { element: Element::F32, key: "0".into(), len: 6 };
            StridedTensor { storage, offset, shape: shape.to_vec(), strides: strides.to_vec() }.span()
        };
        assert_eq!(span(0, &[3, 2], &[1, 3]), Some(6));
        assert_eq!(span(5, &[], &[]), Some(1));
        assert_eq!(span(0, &[0, 9], &[9, 1]), Some(0));
        assert_eq!(span(1, &[2, 3], &[3, 1]), None);
        assert_eq!(span(0, &[1 << 40], &[0]), None);
        assert_eq!(span(u64::MAX, &[1], &[1]), None);
        assert_eq!(span(0, &[u64::MAX, u64::MAX], &[1, 1]), None);
        assert_eq!(span(0, &[2], &[u64::MAX]), None);
        assert_eq!(span(0, &[2], &[]), None);
    }

    #[test]
    fn damage_is_an_error_with_its_place() {
        let message = |bytes: &[u8]| Pickle::parse(bytes).unwrap_err().to_string();
        assert_eq!(message(b""), "byte 0 of the pickle: it ends too early");
        assert_eq!(message(b"\x80\x02X\xff\xff\xff\xff"), "byte 7 of the pickle: it ends too early");
        assert_eq!(
            message(b"I1\n."),
            "byte 1 of the pickle: opcode 0x49 is not one of those that PyTorch writes"
        );
        assert_eq!(message(b"h\x05"), "byte 2 of the pickle: 5 is not in the memo");
        assert_eq!(message(b"(."), "byte 2 of the pickle: a value is missing on the stack");
        assert_eq!(message(b"}(K\x01u."), "byte 5 of the pickle: a key has no value");
        assert_eq!(message(b"t"), "byte 1 of the pickle: a mark is missing on the stack");
        assert_eq!(message(b"K\x01(\x85"), "byte 4 of the pickle: a tuple lacks members");
    }

    /// Opcodes, so that random programs get further than random bytes do.
    fn program() -> impl Strategy<Value = Vec<u8>> {
        let opcodes =
            b"NKM(}])ltdsuae012qhcR\x81\x85\x86\x87\x88\x94\x93bQ.X\x8c\x8f\x90\x92\0\x01\n".to_vec();
        prop::collection::vec(prop::sample::select(opcodes), 0..200)
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_pickle_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Pickle::parse(&bytes);
        }

        #[test]
        fn any_program_is_a_pickle_or_an_error(bytes in program()) {
            if let Ok(pickle) = Pickle::parse(&bytes) {
                prop_assert!(pickle.members(pickle.root()).count() <= bytes.len());
            }
        }

        #[test]
        fn a_changed_byte_is_a_pickle_or_an_error(place in 0usize..200, byte: u8) {
            let mut bytes = [tensor("FloatStorage"), b".".to_vec()].concat();
            let place = place % bytes.len();
            bytes[place] = byte;
            if let Ok(pickle) = Pickle::parse(&bytes)
                && let Value::Tensor(tensor) = pickle.root()
                && let Some(span) = tensor.span()
            {
                prop_assert!(tensor.offset + span <= tensor.storage.len);
            }
        }
    }
}
