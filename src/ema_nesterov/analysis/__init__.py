"""What theory and simple problems say of the lookahead wrappers, with the real wrappers; see docs/theory.md."""
