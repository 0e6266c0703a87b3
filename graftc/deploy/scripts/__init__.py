"""Programs that an export directory carries and that run there without graftc; graftc runs the same ones."""
