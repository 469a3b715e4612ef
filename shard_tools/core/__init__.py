"""What every tool needs: errors, whole files, locks, the quarantine list, parallel work."""
