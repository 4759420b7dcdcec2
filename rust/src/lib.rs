//! `fledge-bpe`: byte-level byte-pair encoding, training and encoding.
//!
//! Text is first *split* into pieces (words, digits, punctuation runs, spaces)
//! by a published pattern, and every piece is a sequence of bytes.
//! *Training* repeatedly joins the most frequent adjacent pair of tokens into
//! a new token; *encoding* replays those merges, lowest rank first, inside
//! each piece. Ids 0..=255 are the bytes themselves; merge number `i` makes id
//! `256 + i`. Special tokens are not known here: the Python class `Tokenizer`
//! cuts them out first, so ordinary text can never become one.
//!
//! # Example
//!
//! ```
//! use fledge_bpe::{train, Bpe, Pattern};
//!
//! let merges = train(["low lower lowest"], 3, Pattern::Qwen2, 1)?;
//! assert_eq!(merges[0], (b'l' as u32, b'o' as u32)); // "lo"
//! assert_eq!(merges[1], (256, b'w' as u32)); // "low"
//! let bpe = Bpe::new(merges, Pattern::Qwen2)?;
//! let ids = bpe.encode("slow");
//! assert_eq!(ids, [b's' as u32, 257]);
//! assert_eq!(bpe.decode(&ids)?, b"slow");
//! # Ok::<(), fledge_bpe::Error>(())
//! ```
//!
//! # Guarantees
//!
//! * The merges depend only on the multiset of texts: not on their order, not
//!   on the number of threads. Ties go to the smaller pair of ids.
//! * Encoding a piece of `n` bytes takes `O(n log n)` time at worst.
//! * Any `str` encodes, and decodes back to the same bytes.
//!
//! # Modules and features
//!
//! `split`, `train` and `encode` are the three steps, each with its own helpers:
//! `blocks`, `masks`, `scan` and `unicode` find pieces, `count`, `table` and
//! `count_file` count them. `reference` is a naive twin of all of them, there
//! to be read and to be tested against. `nn` has nothing to do with text: it is
//! the decode step of a small model on a CPU, in this crate so that there is
//! one module to build. The feature `python` adds the module `fledge._bpe`; the
//! core never sees Python.

#![deny(missing_docs)]

mod batch;
mod blocks;
mod count;
mod count_file;
mod decode;
mod encode;
mod error;
mod masks;
mod merge;
mod merge_short;
pub mod nn;
mod pages;
mod pairs;
#[cfg(feature = "python")]
mod py;
#[cfg(feature = "python")]
mod py_bpe;
#[cfg(feature = "python")]
mod py_step;
#[cfg(feature = "python")]
mod py_train;
mod ranks;
pub mod reference;
mod scan;
mod split;
mod table;
mod train;
mod unicode;
mod words;

pub use crate::count::{Counter, DEFAULT_MEMORY};
pub use crate::decode::Decoder;
pub use crate::encode::Bpe;
pub use crate::error::{Error, ErrorKind};
pub use crate::split::{split, CustomPattern, Pattern, Pieces};
pub use crate::table::PieceCounts;
pub use crate::train::{learn, learn_until, train};

/// Token ids 0..=255 are the bytes; the first merge makes this id.
pub const FIRST_MERGE_ID: u32 = 256;
