"""The `fpsattention` command. Nothing imports it."""
