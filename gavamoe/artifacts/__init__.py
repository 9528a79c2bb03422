"""What lies on disk: written whole, hashed, refused when damaged; run folders; s3:// and other URIs.

run          the run folder: its names, opening and claiming one
logs         training logs, read back
files        folders and files written whole or not at all; bounded reads
checksums    lists of files with sizes and hashes; what has become of them
manifest     artifact folders: listed files, hashes, strict loading
remote       datasets and runs at s3:// and other URIs
"""
