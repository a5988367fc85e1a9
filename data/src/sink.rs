//! Where the bytes of a shard go that is fetched.

use crate::error::Result;

/// Takes the bytes as they come.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<()>;
