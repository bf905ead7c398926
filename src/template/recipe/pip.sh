# Adds Python packages for everybody. Arguments: what to hand to pip. Runs inside the root file
# system. The bytecode of all of them is compiled here and not on first import.
if [ -f /run/mica-build/ca.crt ]; then
    for name in PIP_CERT SSL_CERT_FILE REQUESTS_CA_BUNDLE CURL_CA_BUNDLE; do
        export "$name=/run/mica-build/ca.crt"
    done
fi
python3 -m pip install --break-system-packages --no-cache-dir --root-user-action=ignore \
    --progress-bar off --compile "$@"
python3 -m pip check
