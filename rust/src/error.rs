//! One error type: what went wrong in words, and its kind for programs.
//!
//! Every fallible function of the crate returns it; `py.rs` turns it into
//! Python exceptions by kind.

use std::fmt;

/// What kind of mistake an [`Error`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No split pattern has this name.
    UnknownPattern,
    /// A split regex that does not compile.
    InvalidRegex,
    /// A list of merges that no training could have made.
    InvalidMerges,
    /// Ranks that are no tiktoken vocabulary: a duplicate, a gap, no single byte.
    InvalidRanks,
    /// A token id outside the vocabulary.
    UnknownToken,
    /// A file of counts that is damaged, cut short or of another kind.
    CorruptCounts,
    /// More distinct pieces than can be learnt from.
    TooLarge,
    /// A decode step that asks for what the model or the cache does not have.
    InvalidStep,
    /// Our own mistake: a decode step panicked.
    Panicked,
    /// Stopped half-way by the caller.
    Cancelled,
    /// A file could not be read or written.
    Io,
}

/// An error with its context in words; see [`Error::kind`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Error { kind, message }
    }

    /// The kind of mistake.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
