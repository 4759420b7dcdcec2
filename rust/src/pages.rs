//! Large pages for large buffers, where the system has them to give.
//!
//! The first touch of a page costs about as much as encoding a kilobyte of text, so a fresh
//! buffer of megabytes is worth one call that asks for pages of 2 MiB. Called by `encode` and
//! `words` right after they allocate. It is a wish: nothing depends on its being granted.

/// Asks for large pages for what `buffer` has allocated and not used yet.
pub(crate) fn ask_for_large_pages<T>(buffer: &mut Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 1 << 21;
        let spare = buffer.spare_capacity_mut();
        let start = spare.as_mut_ptr().cast::<libc::c_void>();
        let to_first = (start as usize).next_multiple_of(LARGE) - start as usize;
        let whole = size_of_val(spare).saturating_sub(to_first) / LARGE * LARGE;
        if whole > 0 {
            // SAFETY: these pages belong to the buffer alone, and the advice does not change what
            // is in them. Whether it is taken does not matter.
            unsafe { libc::madvise(start.byte_add(to_first), whole, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = buffer;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_stays_as_it_was() {
        for capacity in [0, 1, 1 << 19, 5 << 19] {
            let mut buffer: Vec<u32> = Vec::with_capacity(capacity);
            buffer.extend(0..capacity as u32 / 3);
            ask_for_large_pages(&mut buffer);
            let start = buffer.as_ptr();
            buffer.extend(capacity as u32 / 3..capacity as u32);
            assert!(buffer.iter().copied().eq(0..capacity as u32));
            assert_eq!(buffer.as_ptr(), start);
        }
    }
}
