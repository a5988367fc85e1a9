//! The opcodes of a pickle.

use std::collections::HashMap;

use super::{Element, Id, PickleError, Result, Storage, StridedTensor, Value};

/// A stack machine that has read a part of a pickle.
pub(super) struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
    values: Vec<Value>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let (stack, marks, values) = (Vec::new(), Vec::new(), Vec::new());
        Self { bytes, at: 0, stack, marks, memo: HashMap::new(), values }
    }

    /// Obeys all opcodes: the values, and the place of the one that the pickle is of.
    ///
    /// # Errors
    /// When the bytes are no pickle of protocols 2 to 5.
    pub(super) fn run(mut self) -> Result<(Vec<Value>, Id)> {
        loop {
            if let Some(root) = self.step()? {
                return Ok((self.values, root));
            }
        }
    }

    /// Obeys one opcode; the last one gives the root.
    fn step(&mut self) -> Result<Option<Id>> {
        match self.byte()? {
            b'.' => return self.pop().map(Some),
            // Protocol and frames.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            // Numbers.
            b'N' | 0x88 | 0x89 => self.push(Value::Plain),
            b'G' => {
                self.take(8)?;
                self.push(Value::Plain);
            }
            b'J' => {
                let number = self.unsigned(4)? as u32;
                self.push(Value::Int(i64::from(number.cast_signed())));
            }
            b'K' => self.integer(1)?,
            b'M' => self.integer(2)?,
            0x8a => self.long(1)?,
            0x8b => self.long(4)?,
            // Strings and bytes.
            0x8c => self.text(1)?,
            b'X' => self.text(4)?,
            0x8d => self.text(8)?,
            b'U' => self.text(1)?,
            b'T' => self.text(4)?,
            b'C' => self.raw(1)?,
            b'B' => self.raw(4)?,
            0x8e | 0x96 => self.raw(8)?,
            // Containers.
            b'(' => self.marks.push(self.stack.len()),
            b'}' => self.push(Value::Dict(Vec::new())),
            b']' | b')' => self.push(Value::Sequence(Vec::new())),
            0x8f => self.push(Value::Opaque("set".into())),
            b'l' | b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Sequence(items));
            }
            0x91 => {
                self.pop_to_mark()?;
                self.push(Value::Opaque("frozenset".into()));
            }
            count @ 0x85..=0x87 => self.tuple(usize::from(count - 0x84))?,
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Dict(Vec::new()));
                self.set_items(&items)?;
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            // The stack and the memo.
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => self.stack.push(self.top()?),
            b'q' => self.memoize(1)?,
            b'r' => self.memoize(4)?,
            0x94 => drop(self.memo.insert(self.memo.len() as u64, self.top()?)),
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            // Functions, classes and what they would make.
            b'c' => self.global()?,
            0x93 => self.stack_global()?,
            b'R' => self.reduce()?,
            0x81 => self.instance(1)?,
            0x92 => self.instance(2)?,
            // State of an object; that of an `OrderedDict` is PyTorch's `_metadata`.
            b'b' => drop(self.pop()?),
            b'Q' => self.persistent()?,
            other => {
                return self.fail(format!("opcode {other:#04x} is not one of those that PyTorch writes"));
            }
        }
        Ok(None)
    }

    fn fail<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(PickleError { at: self.at, reason: reason.into() })
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let end = self.at.checked_add(count).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else { return self.fail("it ends too early") };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    /// A little-endian number of up to eight bytes.
    fn unsigned(&mut self, width: usize) -> Result<u64> {
        Ok(self.take(width)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    /// Bytes after their number, itself of `width` bytes.
    fn counted(&mut self, width: usize) -> Result<&[u8]> {
        let count = self.unsigned(width)?;
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn push(&mut self, value: Value) {
        self.stack.push(Id(self.values.len()));
        self.values.push(value);
    }

    fn top(&self) -> Result<Id> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.floor() => Ok(id),
            _ => self.fail("a value is missing on the stack"),
        }
    }

    fn pop(&mut self) -> Result<Id> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    /// Height of the stack at the last mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        match self.marks.pop() {
            Some(height) => Ok(self.stack.split_off(height)),
            None => self.fail("a mark is missing on the stack"),
        }
    }

    fn integer(&mut self, width: usize) -> Result<()> {
        let number = self.unsigned(width)?;
        self.push(Value::Int(number as i64));
        Ok(())
    }

    /// An integer of any size, in two's complement.
    fn long(&mut self, width: usize) -> Result<()> {
        let bytes = self.counted(width)?;
        let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
        let mut whole = [if negative { 0xff } else { 0 }; 8];
        let value = match whole.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(whole))
            }
            None => Value::Opaque("int of more than 64 bits".into()),
        };
        self.push(value);
        Ok(())
    }

    fn text(&mut self, width: usize) -> Result<()> {
        let text = String::from_utf8_lossy(self.counted(width)?).into_owned();
        self.push(Value::Text(text));
        Ok(())
    }

    fn raw(&mut self, width: usize) -> Result<()> {
        self.counted(width)?;
        self.push(Value::Opaque("bytes".into()));
        Ok(())
    }

    fn tuple(&mut self, count: usize) -> Result<()> {
        let Some(height) = self.stack.len().checked_sub(count).filter(|&height| height >= self.floor())
        else {
            return self.fail("a tuple lacks members");
        };
        let items = self.stack.split_off(height);
        self.push(Value::Sequence(items));
        Ok(())
    }

    /// Puts keys and values, in turn, into the dict on top of the stack. Other objects take them unseen.
    fn set_items(&mut self, items: &[Id]) -> Result<()> {
        let target = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return self.fail("a key has no value");
        }
        if let Value::Dict(dict) = &mut self.values[target.0] {
            dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
        }
        Ok(())
    }

    /// Puts `items` into the list on top of the stack. Other objects take them unseen.
    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        let target = self.top()?;
        if let Value::Sequence(list) = &mut self.values[target.0] {
            list.extend(items);
        }
        Ok(())
    }

    fn memoize(&mut self, width: usize) -> Result<()> {
        let key = self.unsigned(width)?;
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, width: usize) -> Result<()> {
        let key = self.unsigned(width)?;
        match self.memo.get(&key) {
            Some(&id) => self.stack.push(id),
            None => return self.fail(format!("{key} is not in the memo")),
        }
        Ok(())
    }

    fn line(&mut self) -> Result<String> {
        let rest = &self.bytes[self.at..];
        let Some(length) = rest.iter().position(|&byte| byte == b'\n') else {
            return self.fail("a line has no end");
        };
        self.at += length + 1;
        Ok(String::from_utf8_lossy(&rest[..length]).into_owned())
    }

    fn global(&mut self) -> Result<()> {
        let (module, name) = (self.line()?, self.line()?);
        self.push(Value::Global(format!("{module}.{name}")));
        Ok(())
    }

    fn stack_global(&mut self) -> Result<()> {
        let (name, module) = (self.pop()?, self.pop()?);
        match (&self.values[module.0], &self.values[name.0]) {
            (Value::Text(module), Value::Text(name)) => {
                let full = format!("{module}.{name}");
                self.push(Value::Global(full));
                Ok(())
            }
            _ => self.fail("a name is no string"),
        }
    }

    /// The call of a function.
    fn reduce(&mut self) -> Result<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let name = self.name_of(function);
        let arguments = match &self.values[arguments.0] {
            Value::Sequence(arguments) => arguments.as_slice(),
            _ => &[],
        };
        let made = match name.as_str() {
            "collections.OrderedDict" if arguments.is_empty() => Some(Value::Dict(Vec::new())),
            "torch._utils._rebuild_tensor_v2" => self.tensor(arguments).map(Value::Tensor),
            "torch._utils._rebuild_parameter" => arguments.first().map(|id| self.values[id.0].clone()),
            _ => None,
        };
        self.push(made.unwrap_or(Value::Opaque(name)));
        Ok(())
    }

    /// An instance of a class made from `arguments` values.
    fn instance(&mut self, arguments: usize) -> Result<()> {
        for _ in 0..arguments {
            self.pop()?;
        }
        let class = self.pop()?;
        self.push(Value::Opaque(self.name_of(class)));
        Ok(())
    }

    fn name_of(&self, id: Id) -> String {
        match &self.values[id.0] {
            Value::Global(name) | Value::Opaque(name) => name.clone(),
            _ => "an unknown object".into(),
        }
    }

    /// The tensor of `_rebuild_tensor_v2(storage, offset, shape, strides, ...)`.
    fn tensor(&self, arguments: &[Id]) -> Option<StridedTensor> {
        let [storage, offset, shape, strides, ..] = arguments else { return None };
        let Value::Storage(storage) = &self.values[storage.0] else { return None };
        Some(StridedTensor {
            storage: storage.clone(),
            offset: self.size(*offset)?,
            shape: self.sizes(*shape)?,
            strides: self.sizes(*strides)?,
        })
    }

    fn sizes(&self, id: Id) -> Option<Vec<u64>> {
        let Value::Sequence(items) = &self.values[id.0] else { return None };
        items.iter().map(|&item| self.size(item)).collect()
    }

    fn size(&self, id: Id) -> Option<u64> {
        if let Value::Int(number) = self.values[id.0] { number.try_into().ok() } else { None }
    }

    /// What lies outside of the pickle: storages, as `("storage", class, key, device, length)`.
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let storage = self.storage(id);
        self.push(storage.map_or_else(|| Value::Opaque("a storage of unknown kind".into()), Value::Storage));
        Ok(())
    }

    fn storage(&self, id: Id) -> Option<Storage> {
        let Value::Sequence(items) = &self.values[id.0] else { return None };
        let &[_, class, key, _, len] = items.as_slice() else { return None };
        match (&self.values[class.0], &self.values[key.0]) {
            (Value::Global(class), Value::Text(key)) => {
                let element = Element::of_storage_class(class)?;
                Some(Storage { element, key: key.clone(), len: self.size(len)? })
            }
            _ => None,
        }
    }
}
