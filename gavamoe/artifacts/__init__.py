"""What lies on disk: written whole, hashed, refused when damaged; run folders; s3:// and other URIs.

run           the run folder: its names, opening and claiming one
logs          training logs, read back
files         folders and files written whole or not at all; bounded reads
lock          one command at a time in a folder
tensor_files  files of torch: tensors and plain values only
csv_files     tables for spreadsheets, in which no cell is a formula
checksums     lists of files with size and SHA-256; the first difference from one
manifest      artifact folders: config, versions and inputs, listed files, strict loading
remote        datasets and runs at s3:// and other URIs: staged here, committed afterwards
source_files  files that are read once; those at URIs are fetched for the while
copying       a dataset or run copied between folders and URIs, verified
home          the user's home folder, for caches and tokens
object_store  requests to the storage, with retries
stage1_cache  one training of stage 1 shared between runs that agree in all that it reads
"""
