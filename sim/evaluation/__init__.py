"""What a policy can do, measured: each command gives one row of the reach table, from episodes anyone can run again."""
