"""How every stored result was made: `python -m data.evidence` lists the names."""
