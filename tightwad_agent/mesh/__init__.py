"""Who is in the cluster, who is alive, who coordinates, and how one node reaches another."""
