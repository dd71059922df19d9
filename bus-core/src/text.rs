//! [`Text`]: an immutable string that is cheap to clone and to slice.

use std::{borrow::Borrow, fmt, ops::Deref};

use bytestring::ByteString;

/// An immutable UTF-8 string whose clones share one buffer.
///
/// The attributes of an event are of this type: a page of rows read from a log can slice one buffer
/// per row, and a topic or type that repeats is one allocation for all of them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Text(ByteString);

impl Text {
    /// A text that needs no allocation.
    pub const fn from_static(text: &'static str) -> Self {
        Self(ByteString::from_static(text))
    }

    /// The string itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A part of this text that shares its buffer.
    ///
    /// # Panics
    ///
    /// If `part` does not lie inside this text.
    pub fn slice_ref(&self, part: &str) -> Self {
        Self(self.0.slice_ref(part))
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Text {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl From<&String> for Text {
    fn from(text: &String) -> Self {
        Self(text.as_str().into())
    }
}

impl From<&Text> for Text {
    fn from(text: &Text) -> Self {
        text.clone()
    }
}

impl From<std::borrow::Cow<'_, str>> for Text {
    fn from(text: std::borrow::Cow<'_, str>) -> Self {
        match text {
            std::borrow::Cow::Borrowed(text) => text.into(),
            std::borrow::Cow::Owned(text) => text.into(),
        }
    }
}

impl From<uuid::Uuid> for Text {
    fn from(id: uuid::Uuid) -> Self {
        let mut buffer = [0; uuid::fmt::Hyphenated::LENGTH];
        Self::from(&*id.hyphenated().encode_lower(&mut buffer))
    }
}

/// The numbers and other plain values that are used as keys and extension values.
macro_rules! from_display {
    ($($type:ty),*) => {$(
        impl From<$type> for Text {
            fn from(value: $type) -> Self {
                value.to_string().into()
            }
        }
    )*};
}

from_display!(bool, i32, i64, u16, u32, u64, usize, u128);

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
