//! The scanner that finds all pieces of up to 64 bytes at once.
//!
//! A block of text becomes bit masks, one bit a byte and one mask a class, and
//! "a piece begins here" becomes a few shifts and ands of those masks: nothing
//! branches on single characters, so nothing is mispredicted. What a block must
//! know of the text before it is in [`Carry`]. A block with characters beyond
//! ASCII ends at a character boundary; all bytes of such a character are in the
//! mask of its class, and `inner` has its bytes but the first, so that "the
//! character before" is the byte before and "the character after" the byte
//! after. [`crate::split`] walks over the bits. What the masks cannot express
//! (o200k's letters without case, its marks, its slashes after newlines) is
//! left to [`crate::scan`], one piece after another until the block is over.

#[cfg(target_arch = "x86_64")]
use crate::masks::{has_avx2, Avx2};
use crate::masks::{Level, Masks, Plain, BLOCK};
use crate::scan::{contraction, Scanner};
use crate::split::{Family, Rule};
use crate::unicode::{Class, ClassSet};

/// What o200k's masks do not express: letters and marks that count as upper and lower case.
const HARD: ClassSet = Class::Letter.set().or(Class::Mark.set());

/// Finds where pieces begin, block by block.
pub(crate) struct Blocks<'a> {
    scanner: Scanner<'a>,
    next: usize,       // the first byte that no block has had
    last_start: usize, // where the piece that reaches `next` begins
    carry: Carry,
    finished: bool,
    was_hard: bool, // the last block was left to the other scanner for its letters or marks
}

/// What came before a block. All zero: a piece begins with the block.
#[derive(Clone, Copy, Default)]
struct Carry {
    // The class of the last character, each 0 or 1.
    letter: u64,
    lower: u64,
    number: u64,
    other: u64,
    white: u64,
    blank: u64,
    newline: u64,
    /// It is a newline that belongs to the punctuation before it.
    attached: u64,
    /// It is punctuation that begins a piece.
    other_start: u64,
    /// Digits of its piece so far, modulo the longest run.
    digits: usize,
    /// Where contractions of the last block say that pieces (do not) begin.
    forced: u64,
    cleared: u64,
}

/// The masks of a block in terms of the rule, over whole characters.
struct Classes {
    letter: u64,
    upper: u64,
    number: u64,
    other: u64,
    white: u64,
    blank: u64,
    newline: u64,
    quote: u64,
    inner: u64,
}

impl<'a> Blocks<'a> {
    #[inline]
    pub(crate) fn new(text: &'a str, rule: Rule) -> Blocks<'a> {
        Blocks {
            scanner: Scanner::new(text, rule),
            next: 0,
            last_start: 0,
            carry: Carry::default(),
            finished: text.is_empty(),
            was_hard: false,
        }
    }

    /// A place and a mask that is not 0: pieces end at the place + each bit.
    pub(crate) fn next_ends(&mut self) -> Option<(usize, u64)> {
        #[cfg(target_arch = "x86_64")]
        if has_avx2() {
            // SAFETY: the machine has just been asked.
            return unsafe { self.next_ends_avx2() };
        }
        // SAFETY: every machine has this level.
        unsafe { self.next_ends_at::<Plain>() }
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
    fn next_ends_avx2(&mut self) -> Option<(usize, u64)> {
        // SAFETY: this function may only be called where the machine has it.
        unsafe { self.next_ends_at::<Avx2>() }
    }

    /// [`Blocks::next_ends`] with what a machine of level `L` can do.
    ///
    /// # Safety
    ///
    /// The machine is of that level.
    #[inline(always)]
    pub(crate) unsafe fn next_ends_at<L: Level>(&mut self) -> Option<(usize, u64)> {
        let len = self.scanner.text.len();
        while self.next < len {
            let base = self.next;
            // SAFETY: the caller knows the machine.
            let mut starts = unsafe {
                match self.scanner.rule.family {
                    Family::Gpt4 => self.block::<L, false>(),
                    Family::O200k => self.block::<L, true>(),
                }
            };
            if base == 0 {
                starts &= !1; // where the first piece begins none ends
            }
            if starts != 0 {
                return Some((base, starts));
            }
        }
        let rest = !self.finished;
        self.finished = true;
        rest.then_some((len, 1))
    }

    /// The bits where pieces begin in the block at `next`, which moves on.
    ///
    /// # Safety
    ///
    /// The machine is of level `L`.
    #[inline(always)]
    unsafe fn block<L: Level, const CASED: bool>(&mut self) -> u64 {
        let base = self.next;
        let text = self.scanner.text.as_bytes();
        let mut len = BLOCK.min(text.len() - base);
        let mut padded = [0; BLOCK];
        let block = text[base..].first_chunk().unwrap_or_else(|| {
            padded[..len].copy_from_slice(&text[base..]);
            &padded
        });
        // SAFETY: the caller knows the machine.
        let masks = unsafe { L::classify::<CASED>(block) };
        let classes = if masks.wide == 0 {
            let valid = u64::MAX >> (BLOCK - len);
            Some(Classes {
                letter: masks.letter,
                upper: masks.upper,
                number: masks.number,
                other: !(masks.letter | masks.number | masks.white) & valid,
                white: masks.white,
                blank: masks.blank,
                newline: masks.newline,
                quote: masks.quote,
                inner: 0,
            })
        } else if self.was_hard {
            // Likely more of the same script; look again after this one.
            self.was_hard = false;
            None
        } else {
            while !self.scanner.text.is_char_boundary(base + len) {
                len -= 1;
            }
            // SAFETY: the caller knows the machine.
            let inner = unsafe { L::inner_bytes(block) };
            let classes = self.wide_classes::<CASED>(&masks, inner, base, len);
            self.was_hard = classes.is_none();
            classes
        };
        let slashes = CASED && masks.slash & (masks.newline << 1 | self.carry.newline) != 0;
        match classes {
            Some(classes) if !slashes => {
                let starts = self.starts::<CASED>(&classes, base, len);
                self.next = base + len;
                if starts != 0 {
                    self.last_start = base + starts.ilog2() as usize;
                }
                starts
            }
            _ => self.piece_by_piece(base, base + len),
        }
    }

    /// [`Blocks::block`] without masks, up to the first piece that begins at `end` or later.
    #[inline(never)]
    fn piece_by_piece(&mut self, base: usize, end: usize) -> u64 {
        let mut starts = 0;
        let mut at = self.last_start;
        while at < end {
            if at >= base {
                starts |= 1 << (at - base);
            }
            at = self.scanner.piece_end(at);
        }
        self.next = at;
        self.last_start = at;
        self.carry = Carry::default();
        starts
    }

    /// The classes of a block of `len` bytes that has characters beyond ASCII.
    ///
    /// None if it has some of which only [`crate::scan`] can tell.
    fn wide_classes<const CASED: bool>(
        &self,
        masks: &Masks,
        inner: u64,
        base: usize,
        len: usize,
    ) -> Option<Classes> {
        let text = self.scanner.text.as_bytes();
        let rule = self.scanner.rule;
        let valid = u64::MAX >> (BLOCK - len);
        let inner = inner & valid;
        // First the bits of first bytes. Nothing in this loop waits for the turn before.
        let (mut letter, mut upper, mut number, mut space, mut hard) = (0, 0, 0, 0, 0);
        let mut firsts = masks.wide & valid & !inner;
        while firsts != 0 {
            let at = firsts.trailing_zeros();
            firsts &= firsts - 1;
            let (class, _) = self.scanner.table.at_wide(text, base + at as usize);
            letter |= rule.letters.bit(class) << at;
            number |= Class::Number.set().bit(class) << at;
            space |= Class::Space.set().bit(class) << at;
            if CASED {
                upper |= Class::Upper.set().bit(class) << at;
                hard |= HARD.bit(class);
            }
        }
        if CASED && hard != 0 {
            return None;
        }
        let spread = |mut mask: u64| {
            for _ in 0..3 {
                mask |= mask << 1 & inner;
            }
            mask
        };
        let letter = masks.letter & valid | spread(letter);
        let number = masks.number & valid | spread(number);
        let white = masks.white & valid | spread(space);
        Some(Classes {
            letter,
            upper: masks.upper & valid | spread(upper),
            number,
            other: !(letter | number | white) & valid,
            white,
            blank: masks.blank & valid,
            newline: masks.newline & valid,
            quote: masks.quote & valid,
            inner,
        })
    }

    /// Where pieces begin in the block of `len` bytes at `base`; updates the carry.
    #[inline(always)]
    fn starts<const CASED: bool>(&mut self, c: &Classes, base: usize, len: usize) -> u64 {
        let carry = self.carry;
        let first = !c.inner; // first bytes of characters
        let space = c.white & !c.newline;
        // "The character before is ...":
        let after_letter = c.letter << 1 | carry.letter;
        let after_number = c.number << 1 | carry.number;
        let after_other = c.other << 1 | carry.other;
        let after_white = c.white << 1 | carry.white;
        let after_newline = c.newline << 1 | carry.newline;
        let after_blank = c.blank << 1 | carry.blank;
        let after_space = after_white & !after_newline;

        // Punctuation begins a piece unless it goes on or has a blank in front.
        let other_start = c.other & first & !after_other & !after_blank;
        // Newlines right behind punctuation belong to it: the sum carries
        // through every run of newlines that has such a place at its start.
        let touching = c.newline & (after_other | carry.attached);
        let attached = c.newline & !c.newline.wrapping_add(touching);
        let after_attached = attached << 1 | carry.attached;

        // A letter goes on, or joins one space or one character of punctuation
        // that begins a piece.
        let single = self.last_bytes(other_start, c.inner);
        let joins = after_space | single << 1 | carry.other_start;
        let mut starts = c.letter & first & !after_letter & !joins;
        let mut lower = 0;
        if CASED {
            lower = c.letter & !c.upper;
            starts |= c.upper & first & (lower << 1 | carry.lower);
        }

        starts |= other_start;

        // White space: the first of a run, what follows attached newlines, and
        // the last before something else ...
        starts |= c.white & first & !after_white & !(c.newline & after_other);
        starts |= space & first & after_attached;
        if space != 0 {
            let top = 1 << (len - 1);
            let white_follows = (c.white >> 1) | (self.white_at(base + len) * top);
            starts |= self.first_bytes(space & !white_follows, c.inner);
            // ... and what follows the last newline of a run.
            let mut tails = space & first & after_newline & !after_attached;
            while tails != 0 {
                let at = tails.trailing_zeros();
                if !self.newline_ends(c, space, at as usize, base, len) {
                    starts |= 1 << at;
                }
                tails &= tails - 1;
            }
        }

        let mut digits = 0;
        if c.number != 0 {
            let max_digits = self.scanner.rule.max_digits;
            let mut numbers = c.number & first;
            if max_digits == 1 {
                starts |= numbers;
            } else {
                digits = carry.digits;
                while numbers != 0 {
                    let bit = numbers & numbers.wrapping_neg();
                    if after_number & bit == 0 {
                        digits = 0;
                    }
                    if digits == 0 {
                        starts |= bit;
                    }
                    digits = (digits + 1) % max_digits;
                    numbers ^= bit;
                }
            }
        }

        let (mut forced, mut cleared) = (u128::from(carry.forced), u128::from(carry.cleared));
        // An apostrophe with a contraction: a piece of its own that begins here, or (o200k) the
        // end of the word before.
        let mut quotes = c.quote & if CASED { after_letter } else { other_start };
        while quotes != 0 {
            let at = quotes.trailing_zeros() as usize;
            quotes &= quotes - 1;
            if CASED && forced >> at & 1 != 0 {
                continue; // the word before ended with a contraction already
            }
            if let Some(end) = contraction(self.scanner.text.as_bytes(), base + at) {
                let end = end - base;
                forced |= 1 << end;
                if CASED {
                    cleared |= (1 << end) - (1 << at);
                }
            }
        }
        starts = starts & !(cleared as u64) | forced as u64;

        let last = |mask: u64| mask >> (len - 1) & 1;
        self.carry = Carry {
            letter: last(c.letter),
            lower: last(lower),
            number: last(c.number),
            other: last(c.other),
            white: last(c.white),
            blank: last(c.blank),
            newline: last(c.newline),
            attached: last(attached),
            other_start: last(single),
            digits: if last(c.number) != 0 { digits } else { 0 },
            forced: (forced >> len) as u64,
            cleared: (cleared >> len) as u64,
        };
        // Bits behind a shorter block belong to the next one.
        starts & u64::MAX >> (BLOCK - len)
    }

    /// Moves bits from the first bytes of characters to their last bytes.
    #[inline(always)]
    fn last_bytes(&self, mut mask: u64, inner: u64) -> u64 {
        if inner == 0 {
            return mask;
        }
        for _ in 0..3 {
            let more = mask << 1 & inner;
            mask = mask & !(inner >> 1) | more;
        }
        mask
    }

    /// Moves bits from the last bytes of characters to their first bytes.
    #[inline(always)]
    fn first_bytes(&self, mut mask: u64, inner: u64) -> u64 {
        if inner == 0 {
            return mask;
        }
        for _ in 0..3 {
            mask = mask & !inner | (mask & inner) >> 1;
        }
        mask
    }

    /// 1 if the character at `at` is white space or the text is over, else 0.
    #[inline(always)]
    fn white_at(&self, at: usize) -> u64 {
        let bytes = self.scanner.text.as_bytes();
        let white = match bytes.get(at) {
            None => true,
            Some(_) => matches!(
                self.scanner.table.at(bytes, at).0,
                Class::Space | Class::Newline
            ),
        };
        u64::from(white)
    }

    /// Whether the run of spaces that begins at bit `at` ends in a newline.
    fn newline_ends(&self, c: &Classes, space: u64, at: usize, base: usize, len: usize) -> bool {
        let end = at + (!(space >> at)).trailing_zeros() as usize;
        if end < len {
            return c.newline >> end & 1 != 0;
        }
        let bytes = self.scanner.text.as_bytes();
        let mut at = base + len;
        while at < bytes.len() {
            match self.scanner.table.at(bytes, at) {
                (Class::Space, len) => at += len,
                (class, _) => return class == Class::Newline,
            }
        }
        false
    }
}
