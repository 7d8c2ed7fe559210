//! Placeholder, replaced in the next change.
