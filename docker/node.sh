#!/usr/bin/env bash
# Start of a cluster node's container: an sshd that the other nodes enter without a password.
#
#   node.sh serve             keys and configuration in $SSH_FOLDER (a volume all nodes share), then
#                             sshd in the foreground
#   node.sh join COMMAND ...  keys and configuration, then the command, which can enter the others
#                             (a Kubernetes launcher pod)
#   node.sh COMMAND ...     anything else is run as it stands
#
# The first node to start makes one user key and one host key for the cluster; known_hosts trusts
# that host key alone, so host key checking stays on. Port $SSH_PORT (2222: the host's own sshd may
# hold 22). pdsh and mpirun find both through ~/.ssh/config.
set -euo pipefail

folder="${SSH_FOLDER:-/cluster/ssh}"
port="${SSH_PORT:-2222}"
home="${SSH_HOME:-$HOME/.ssh}"

case "${1:-serve}" in
    serve | join) ;;
    *) exec "$@" ;;
esac

mkdir -p "$folder" "$home"
chmod 700 "$folder" "$home"
exec 9> "$folder/lock"
flock 9   # nodes start together and only one makes the keys
for name in user host; do
    [ -s "$folder/$name.pub" ] ||
        ssh-keygen -q -t ed25519 -N '' -C "grads-ds-$name" -f "$folder/$name"
done
flock -u 9
exec 9>&-   # sshd must not inherit it

cp "$folder/user" "$folder/host" "$home/"
cp "$folder/user.pub" "$home/authorized_keys"
chmod 600 "$home/user" "$home/host" "$home/authorized_keys"
printf '* %s\n' "$(cut -d' ' -f1,2 "$folder/host.pub")" > "$home/known_hosts"
cat > "$home/config" << CONFIG
Host *
    Port $port
    IdentityFile "$home/user"
    IdentitiesOnly yes
    UserKnownHostsFile "$home/known_hosts"
    StrictHostKeyChecking yes
    BatchMode yes
CONFIG
chmod 600 "$home/config"

if [ "${1:-serve}" = join ]; then
    shift
    exec "$@"
fi
[ "$(id -u)" != 0 ] || mkdir -p /run/sshd   # root's sshd wants it; a user's lets that user in alone
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e \
    -o "Port=$port" -o "HostKey=\"$home/host\"" -o "AuthorizedKeysFile=\"$home/authorized_keys\"" \
    -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no \
    -o PermitRootLogin=prohibit-password \
    -o UsePAM=no -o "PidFile=\"$home/sshd.pid\"" -f /dev/null
